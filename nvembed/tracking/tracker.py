"""MLflow runs and metrics of an output directory.

The output is the source (`manifest.json`, `metrics.jsonl`); MLflow is a copy of it. Every call here can be repeated: it
reads what MLflow has and sends what is missing. So an outage costs nothing but a warning, and a killed run sends the
rest when it is resumed. MLflow is imported on first use only, so a recipe is validated without it.

Numbers, parameters, hashes and URIs are sent; texts of the data never are.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from nvembed.core import storage
from nvembed.core.runtime import git_revision
from nvembed.core.steps import MANIFEST, METRICS, load_artifact
from nvembed.tracking.config import TrackingConfig
from nvembed.tracking.store import Tail, flatten, log_metrics, numbers, prepare_environment, probe, resolve_store
from nvembed.types import Artifact, Config

logger = logging.getLogger(__name__)

STATE = "tracking.json"
RETRY_SECONDS = 30.0  # after a failure MLflow is left alone for this long
_STATUS = {"finished": "FINISHED", "done": "FINISHED", "skipped": "FINISHED"}
_STATUS |= {"failed": "FAILED", "interrupted": "KILLED"}
_BATCH_PARAMS = 100  # MLflow's own limit of one log_batch call


def open_client(uri: str) -> Any:
    """An MlflowClient for tracking and registry at `uri`, without global state, telemetry or migration chatter."""
    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class Tracker:
    """The MLflow runs of one output: a parent run, and a child run per pipeline step.

    Their ids are in `<out>/tracking.json` and, as a tag, in MLflow; so an output has one parent run, even if killed and
    resumed. The parent, called `name`, has the resolved `recipe` as its parameters.
    No method raises because of MLflow; only an output that needs a tracking URI and has none is a UserError.
    """

    def __init__(self, config: TrackingConfig, out: str, recipe: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.out = storage.absolute(out)
        self.name = name
        self.recipe = recipe
        self.store = resolve_store(config.uri, self.out) if config.enabled else None
        self._lock = threading.RLock()
        self._client: Any = None
        self._steps: dict[str, StepRun] = {}
        self._retry_at = 0.0
        self._down = False
        self._file = storage.join(self.out, STATE)
        self._all: dict[str, Any] = {"key": uuid.uuid4().hex, "stores": {}}
        self._state: dict[str, Any] = {}
        if self.store is not None:
            if storage.exists(self._file):
                self._all = storage.read_json(self._file)
            new: dict[str, Any] = {"experiment_id": None, "parent_run": None, "closed": None, "steps": {}}
            self._state = self._all["stores"].setdefault(self.store.configured or "output", new)
            self._write_state()  # the key is on disk before a run is made under it

    def _write_state(self) -> None:
        storage.write_json(self._file, self._all)

    def _attempt(self, action: Callable[[Any], None]) -> bool:
        """Run `action(client)`; False if MLflow fails now, or failed less than RETRY_SECONDS ago."""
        if self.store is None:
            return True
        with self._lock:
            if time.monotonic() < self._retry_at:
                return False
            try:
                probe(self.store.uri)
                if self._client is None:
                    self._open()
                action(self._client)
            except Exception as error:  # no error of tracking stops the training
                self._retry_at = time.monotonic() + RETRY_SECONDS
                if not self._down:
                    cause = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    logger.warning("MLflow failed (%s); the run continues and sends the rest later", cause)
                logger.debug("MLflow failure", exc_info=True)
                self._down = True
                return False
            if self._down:
                logger.warning("MLflow answers again")
            self._down, self._retry_at = False, 0.0
            return True

    @property
    def parent_run_id(self) -> str | None:
        """Id of the parent run; None until MLflow was reached."""
        return self._state.get("parent_run")

    def _open(self) -> None:
        assert self.store is not None
        client = open_client(self.store.uri)
        state = self._state
        experiment = client.get_experiment_by_name(self.config.experiment)
        if experiment is None:
            state["experiment_id"] = client.create_experiment(self.config.experiment, self.store.artifact_root)
        elif state["experiment_id"] != experiment.experiment_id:
            state.update(experiment_id=experiment.experiment_id, parent_run=None)
        run = self._run(client, state["parent_run"], self._all["key"], self.name, {})
        if state["parent_run"] != run.info.run_id:  # new, or deleted in MLflow: its steps are sent again
            state["parent_run"] = run.info.run_id
            for step in state["steps"].values():
                step.update(run_id=None, sent=None)
        state["closed"] = None
        self._write_state()
        _log_params(client, run, flatten(self.recipe))
        client.update_run(run.info.run_id, status="RUNNING")
        tags = {"nvembed.output": self.out, "nvembed.git_revision": git_revision() or "unknown"}
        _set_tags(client, run.info.run_id, tags)
        self._client = client

    def _run(self, client: Any, run_id: str | None, key: str, name: str, tags: Mapping[str, str]) -> Any:
        """The run with this id if it still exists, else the one tagged `key`, else a new one."""
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                run = client.get_run(run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment_id = self._state["experiment_id"]
        matches = client.search_runs([experiment_id], f"tags.`nvembed.key` = '{key}'", max_results=1)
        if matches:
            return matches[0]
        made = client.create_run(experiment_id, run_name=name, tags={"nvembed.key": key, **tags})
        return client.get_run(made.info.run_id)

    @contextmanager
    def step(
        self, name: str, config: Config | None = None, inputs: Mapping[str, Artifact] | None = None
    ) -> Iterator[StepRun]:
        """The child run of the pipeline step at `<out>/<name>`; ended by `finish`, or by leaving the block.

        `config` gives its parameters, `inputs` the lineage; a run whose step has others is another run.
        """
        handle = self._handle(name, config, inputs or {})
        handle.start()
        try:
            yield handle
        except BaseException as error:
            if handle.status is None:  # what was finished stays so, even if Ctrl-C came while it was sent
                handle.finish(None, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        if handle.status is None:
            handle.finish(None)

    def _handle(self, name: str, config: Config | None, inputs: Mapping[str, Artifact]) -> StepRun:
        parts = [flatten(config) if config else {}, {key: value.manifest_hash for key, value in inputs.items()}]
        identity = storage.hash_json(parts)[:12]
        with self._lock:
            if self._state and self._state["steps"].get(name, {}).get("identity") != identity:
                self._state["steps"][name] = {"identity": identity, "run_id": None, "sent": None}
                self._write_state()
            self._steps[name] = StepRun(self, name, config, inputs)
            return self._steps[name]

    def sync(self) -> bool:
        """Send everything that MLflow does not have yet, in one attempt; True when nothing is left."""
        if self.store is None:
            return True
        with self._lock:
            for name, state in self._state["steps"].items():
                if state["sent"] is None and name not in self._steps:  # left by an earlier run of this output
                    self._steps[name] = StepRun(self, name, None, {})
            self._retry_at = 0.0
            sent = [step.send() for step in self._steps.values()]
            return all(sent)

    def close(self, status: str = "finished") -> bool:
        """End the parent run after sending the backlog; True when MLflow has everything."""
        if self.store is None:
            return True
        ended, done = _STATUS[status], self.sync()
        if done and self._state["closed"] == ended:
            return True  # an unchanged run: no call to MLflow is needed

        def end(client: Any) -> None:
            client.set_terminated(self.parent_run_id, ended)
            self._state["closed"] = ended
            self._write_state()

        return self._attempt(end) and done


class StepRun:
    """Handle of one child run. `tail` may be called from another thread than `finish`."""

    def __init__(self, tracker: Tracker, name: str, config: Config | None, inputs: Mapping[str, Artifact]) -> None:
        self.name = name
        self.status: str | None = None
        self._tracker = tracker
        self._parameters = flatten(config) if config else {}
        self._inputs = {key: (artifact.uri, artifact.manifest_hash) for key, artifact in inputs.items()}
        self._artifact: Artifact | None = None
        self._metrics_uri = storage.join(tracker.out, name, METRICS)
        self._tail = Tail()
        self._described = False

    @property
    def _state(self) -> dict[str, Any]:
        return cast(dict[str, Any], self._tracker._state["steps"][self.name])

    @property
    def run_id(self) -> str | None:
        """Id of the child run; None when tracking is off or MLflow has not been reached."""
        return None if self._tracker.store is None else self._state["run_id"]

    def start(self) -> None:
        """Mark the run as running, unless the step was sent in full before."""
        if not self._settled:
            self._tracker._attempt(self._describe)

    def tail(self, metrics_uri: str | None = None) -> bool:
        """Send the optimiser steps of `metrics_uri` (default `<out>/<step>/metrics.jsonl`) MLflow does not have.

        Cheap; call it every few seconds. False if MLflow failed and rows wait for the next call.
        """
        with self._tracker._lock:
            self._metrics_uri = metrics_uri or self._metrics_uri
            if self._settled or self.status is not None:
                return self.send()
            return self._tracker._attempt(self._send_metrics)

    def publish(self, artifact: Artifact) -> None:
        """Take parameters, inputs and results from the step's artifact."""
        self._artifact, self.status = artifact, "FINISHED"
        self._metrics_uri = artifact.path(METRICS)
        manifest = artifact.manifest
        self._parameters = flatten(manifest["config"]) | self._parameters
        uris = manifest.get("input_uris", {})
        self._inputs = {
            name: (uris.get(name, ""), digest) for name, digest in manifest["inputs"].items()
        } | self._inputs

    def finish(self, artifact: Artifact | None, status: str = "finished") -> bool:
        """End the run: results, hashes and lineage of the artifact. False if MLflow failed and `sync` must send it."""
        with self._tracker._lock:
            if artifact is not None:
                self.publish(artifact)
            self.status = _STATUS[status]
            return self.send()

    def send(self) -> bool:
        """Send what MLflow lacks, unless everything was sent before."""
        if self._settled and self._wanted in (None, self._sent):
            return True
        return self._tracker._attempt(self._send_all)

    @property
    def _settled(self) -> bool:
        """True where an earlier run of this output sent the finished step, and where tracking is off."""
        return self._tracker.store is None or self._sent not in (None, "FAILED", "KILLED")

    @property
    def _sent(self) -> str | None:
        return None if self._tracker.store is None else self._state["sent"]

    @property
    def _wanted(self) -> str | None:
        """The value of `sent` once everything was sent: the manifest's hash, or the status of a step without one."""
        return self._artifact.manifest_hash if self._artifact is not None else self.status

    def _describe(self, client: Any) -> None:
        tracker = self._tracker
        if self._described:
            return
        key = f"{tracker._all['key']}/{self.name}/{self._state['identity']}"
        tags = {"mlflow.parentRunId": tracker.parent_run_id or "", "nvembed.step": self.name}
        run = tracker._run(client, self._state["run_id"], key, self.name, tags)
        if run.data.tags["mlflow.parentRunId"] != tracker.parent_run_id:
            _set_tags(client, run.info.run_id, tags)
        if self._state["run_id"] != run.info.run_id:
            self._state["run_id"] = run.info.run_id
            tracker._write_state()
        _log_params(client, run, self._parameters)
        _log_lineage(client, run.info.run_id, self._inputs)
        if self.status is None:
            client.update_run(run.info.run_id, status="RUNNING")
        self._described = True

    def _send_metrics(self, client: Any) -> None:
        from mlflow.entities import Metric

        self._describe(client)
        self._tail.send(client, self._state["run_id"], self._metrics_uri, Metric)

    def _send_all(self, client: Any) -> None:
        step = storage.join(self._tracker.out, self.name)
        if self.status is None and storage.exists(storage.join(step, MANIFEST)):
            self.publish(load_artifact(step, verify=False))
        self._described = self._described and self._artifact is None  # the manifest may know more than the start did
        self._send_metrics(client)
        run_id = self._state["run_id"]
        if self._artifact is not None:
            _log_results(client, client.get_run(run_id), self._artifact)
        if self.status is not None:
            client.set_terminated(run_id, self.status)
            self._state["sent"] = self._wanted
            self._tracker._write_state()


def _log_params(client: Any, run: Any, params: Mapping[str, str]) -> None:
    """Parameters cannot change in MLflow; those a run has already stay."""
    from mlflow.entities import Param

    new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    for begin in range(0, len(new), _BATCH_PARAMS):
        client.log_batch(run.info.run_id, params=new[begin : begin + _BATCH_PARAMS])


def _set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _log_lineage(client: Any, run_id: str, inputs: Mapping[str, tuple[str, str]]) -> None:
    """Input artifacts as data sets of the run; MLflow's digest holds the first 36 digits of the manifest hash."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if not inputs:
        return
    listed = []
    for name, (uri, manifest_hash) in sorted(inputs.items()):
        source = json.dumps({"uri": uri, "manifest_hash": manifest_hash})
        dataset = Dataset(name=name, digest=manifest_hash[:36], source_type="nvembed", source=source)
        listed.append(DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", name)]))
    client.log_inputs(run_id, listed)
    _set_tags(client, run_id, {f"nvembed.input.{name}": digest for name, (_, digest) in inputs.items()})


def _log_results(client: Any, run: Any, artifact: Artifact) -> None:
    """Hashes as tags; rows, seconds and every numeric result of the manifest as metrics at step 0."""
    from mlflow.entities import Metric

    manifest = artifact.manifest
    tags = {"fingerprint": artifact.fingerprint, "manifest_hash": artifact.manifest_hash, "artifact": artifact.uri}
    tags["git_revision"] = manifest["git_revision"] or "unknown"
    _set_tags(client, run.info.run_id, {f"nvembed.{key}": value for key, value in tags.items()})
    started, seconds = manifest["timing"]["started"], manifest["timing"]["seconds"]
    when = int((started + seconds) * 1000)
    results = numbers({"rows": manifest["rows"], "result": manifest["metrics"], "seconds": seconds})
    new = [Metric(key, value, when, 0) for key, value in results.items() if key not in run.data.metrics]
    log_metrics(client, run.info.run_id, new)
