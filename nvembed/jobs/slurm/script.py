"""The body of the batch script; `backend.py` replaces the names between @ signs."""

FAILED_CODE = 4

BODY = r"""
# @NAME@, rendered by `nvembed submit`. No secrets in here.
set -euo pipefail
say() { echo "nvembed: $*" >&2; }
fail() { say "error: $*"; exit 3; }
open_umask=$(umask)
umask 077
job_dir=@SHARED@/jobs/$SLURM_JOB_ID
temp=@TEMP@/nv-$SLURM_JOB_ID
mkdir -p "$job_dir"
rm -f "$job_dir/exit_code" "$job_dir/driver.pid"
# However this ends, its code is on the shared storage: not every cluster has accounting. The run's own goes first.
leave_code() { code=$?; [ -f "$job_dir/exit_code" ] || echo "$code" > "$job_dir/exit_code"; }
trap leave_code EXIT
@SECRETS@
set +u  # sourced files may read unset variables
@SETUP@
set -u
@VARIABLES@
cat > "$job_dir/@RECIPE_FILE@" <<'END_OF_RECIPE'
@RECIPE@
END_OF_RECIPE

# Ray: a token of this job, which every node reads from the shared directory (mode 600), never from a command line.
head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' > "$job_dir/auth_token"
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$job_dir/auth_token" RAY_USAGE_STATS_ENABLED=0
export RAY_ADDRESS="@HEAD@:@PORT@"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=@WAIT@ NVEMBED_JOB_DIR="$job_dir"

# The run, on the first node. Its own exit code goes to a file: the ends of the worker nodes would hide it.
cat > "$job_dir/driver.sh" <<'END_OF_DRIVER'
"$@" &
run=$!
echo "$run" > "$NVEMBED_JOB_DIR/driver.pid"
trap : TERM INT
code=0
while kill -0 "$run" 2>/dev/null; do code=0; wait "$run" || code=$?; done
echo "$code" > "$NVEMBED_JOB_DIR/exit_code"
exit "$code"
END_OF_DRIVER

umask "$open_umask"

# The time limit has its own signal: scancel sends TERM to this shell too, and a stopped job must not be requeued.
stopping=0
stop_run() { kill -TERM "$(cat "$job_dir/driver.pid" 2>/dev/null)" 2>/dev/null || true; }
on_limit() {
  stopping=1
  say "the time limit is near; the run saves and ends"
  stop_run
}
on_term() {
  say "stopped; the run saves and ends, and is not requeued"
  stop_run
}
trap on_limit USR1
trap on_term TERM

everywhere="srun --nodes=@NODES@ --ntasks=@NODES@ --ntasks-per-node=1 --export=ALL"
# srun does not take --cpus-per-task over from sbatch (since Slurm 22.05)
$everywhere --cpus-per-task=@CPUS@ --cpu-bind=none \
  ray symmetric-run --address "$RAY_ADDRESS" --min-nodes @NODES@ \
  @START@ \
  -- bash "$job_dir/driver.sh" @COMMAND@ &
step=$!
after=0
while kill -0 "$step" 2>/dev/null; do
  sleep 1 & wait $! || true  # a signal ends this wait at once
  if [ -f "$job_dir/exit_code" ]; then after=$((after + 1)); fi
  if [ "$after" -eq 60 ]; then kill -TERM "$step" 2>/dev/null || true; fi  # nodes that do not notice the end
done
wait "$step" || true
rm -f "$job_dir/auth_token" "$job_dir/driver.pid"
code=$(cat "$job_dir/exit_code" 2>/dev/null || echo 4)  # symmetric-run ends with 0 where Ray did not start
say "the run ended with exit code $code"
if [ "$stopping" = 0 ]; then timeout 60 $everywhere rm -rf -- "$temp" || true; fi
if [ "$stopping" = 1 ] && [ "$code" != 0 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt @REQUEUES@ ]; then
    say "requeued; the next attempt resumes where this one stopped"
    scontrol requeue "$SLURM_JOB_ID"
  else
    say "not requeued: @REQUEUES@ requeues were made"
  fi
fi
exit "$code"
"""
