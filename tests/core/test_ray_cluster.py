"""A private Ray cluster: its ports, its token, its folder; where HOME cannot be written and TMPDIR is long."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed.core.ray_cluster import make_token, private_folder, tighten, use_token
from nvembed.types import UserError

START = """
import json, os, psutil
from nvembed.core.ray_cluster import ensure_ray
ensure_ray(1)
import ray
assert ray.get(ray.remote(lambda: 1).remote()) == 1
me = psutil.Process()
listening = {
    port.laddr.ip
    for process in (me, *me.children(recursive=True))
    for port in process.net_connections(kind="inet") if port.status == "LISTEN"
}
print("RESULT" + json.dumps({"listening": sorted(listening), "token": os.environ["RAY_AUTH_TOKEN_PATH"]}))
"""


@pytest.mark.ray
def test_only_the_owner_reaches_a_private_cluster(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    home = tmp_path / "home"
    long.mkdir()
    home.mkdir(mode=0o500)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    environment = {**variables, "HOME": str(home), "TMPDIR": str(long)}
    done = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    assert {address.removeprefix("::ffff:") for address in result["listening"]} == {"127.0.0.1"}
    token = Path(result["token"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64 and not list(home.iterdir())


def test_a_token_is_its_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/token"
    assert make_token(path) == path and stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_text()
    path.chmod(0o644)
    assert make_token(path).read_text() == first and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not tighten(path) and not tighten(tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    rays = tmp_path / ".ray/auth_token"
    rays.parent.mkdir()
    rays.write_text("x")
    rays.chmod(0o644)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    use_token(tmp_path / "new")
    assert stat.S_IMODE(rays.stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "new/auth_token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/mine")
    use_token(tmp_path / "new")
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == "/mine"


def test_a_folder_that_is_another_users_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvembed.core.ray_cluster._LONGEST_TEMPORARY", 200)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = private_folder()
    assert folder == tmp_path / f"nvembed-ray-{os.getuid()}" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert private_folder().parent == Path("/tmp"), "a link is not followed"
    monkeypatch.setattr("nvembed.core.ray_cluster._LONGEST_TEMPORARY", 3)
    with pytest.raises(UserError, match=r"no place for Ray's sockets: .* is too long .* Set TMPDIR to a short path"):
        private_folder()
