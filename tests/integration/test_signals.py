"""A job that is asked to stop: in every stage, at once, with exit code 143."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job import storage
from tests.conftest import S3
from tests.faults.proxy import Fault, Proxy
from tests.jobs import ROOT, Running, job, read_json, small_run, start
from tests.suspended import has_ended

STAGES = ("prep", "baseline", "train", "eval", "export", "report")
SECONDS = 2.0
"""How soon the job has to end; a step of training, and its checkpoint, come on top."""
BUSY = 20.0  # seconds that a machine with other work may take longer


def wait_for(process: Running, text: str) -> str:
    """Reads what the process says until `text` is in it; gives it all."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    raise AssertionError(f"the job ended before it said {text!r}:\n{said}")


def stop_in(stage: str, after: float, output: Path, cache: Path) -> tuple[int, str, float]:
    """Stops a run `after` seconds into the stage: its exit code, what it said, how long it took."""
    process = start(*small_run(str(output), cache=cache))
    said = wait_for(process, f"{stage}: started")
    time.sleep(after)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    assert process.returncode is not None
    return process.returncode, said + rest, time.monotonic() - sent


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("part", [0.0, 0.6])
def test_sigterm_ends_every_stage_at_once_with_143(
    finished: Path, tmp_path: Path, stage: str, part: float
) -> None:
    seconds = read_json(finished / "run.json")["stages"][stage]["seconds"]
    # Measured on a machine with other work, a stage can be over sooner than its share of that.
    for attempt in range(6):
        output = Path(shutil.copytree(finished, tmp_path / f"out-{attempt}"))
        for name in STAGES[STAGES.index(stage) :]:
            (output / ".stages" / f"{name}.json").unlink()
        shutil.rmtree(output / "checkpoints")
        after = part * seconds / 2**attempt
        code, said, took = stop_in(stage, after, output, tmp_path / f"cache-{attempt}")
        if f"{stage}: done" not in said:
            break
    assert f"{stage}: done" not in said, said
    assert code == 143, said
    assert took < SECONDS + BUSY, said
    assert "SIGTERM" in said  # the line that it stops comes from a thread, and may be too late
    assert "Traceback" not in said
    run = read_json(output / "run.json")
    assert run["status"] == "preempted"
    assert run["error"][0]["field"] == "SIGTERM"
    assert not (output / "_SUCCESS").exists()
    if stage == "train" and "after this step" in said:
        assert list((output / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.parametrize(
    "request_under_way", ["GET .*/model/model.safetensors", "PUT .*/out/adapter/adapter_model"]
)
def test_sigterm_in_a_transfer_that_stands_still_ends_it_at_once(
    request_under_way: str, s3: S3, tmp_path: Path
) -> None:
    storage.upload_tree(ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny", s3.uri("model"))
    fault = Fault(kind="stall", matching=request_under_way, seconds=120)
    model = ("--set", f"model.model_name_or_path={s3.uri('model')}")
    more = ("--set", "eval.baseline=false")
    arguments = small_run(s3.uri("out"), *model, *more, cache=tmp_path / "cache")
    with Proxy(s3.server.endpoint, fault) as proxy:
        process = start(*arguments, environ={"AWS_ENDPOINT_URL": proxy.endpoint})
        while not fault.hits and process.poll() is None:
            time.sleep(0.05)
        assert fault.hits
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert time.monotonic() - sent < SECONDS + BUSY, said
    assert "Traceback" not in said
    assert json.loads(storage.read_text(s3.uri("out/run.json")))["status"] == "preempted"


SCRIPT = """
import sys, threading, time
from job import signals
signals.install(lambda stopped: print("last words", stopped.exit_code, file=sys.stderr, flush=True))
def ready():
    print("ready", file=sys.stderr, flush=True)
{work}
print("went on", file=sys.stderr)
"""
STUCK = {
    "waits while it cleans up": """
try:
    ready()
    time.sleep(60)
finally:
    threading.Event().wait(60)
""",
    "swallows exceptions": """
while True:
    try:
        ready()
        time.sleep(60)
    except BaseException:
        pass
""",
    "loses exceptions in one finalizer after another": """
class Let:
    def __del__(self):
        ready()
        time.sleep(1)

many = [Let() for _ in range(10_000)]
many.clear()
""",
    "stays in C code": """
import hashlib
def computes(since):
    while time.process_time() < since + 0.2:
        time.sleep(0.01)
    ready()

threading.Thread(target=computes, args=(time.process_time(),), daemon=True).start()
hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
""",
}


def scripted(work: str, **environ: str) -> subprocess.Popen[str]:
    """A process that does the work, once it says that it is `ready` for a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(work=work)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
    )
    wait_for(process, "ready")
    return process


@pytest.mark.parametrize("work", STUCK.values(), ids=STUCK.keys())
def test_work_that_does_not_end_is_left_with_last_words(work: str) -> None:
    process = scripted(work)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert time.monotonic() - sent < SECONDS + BUSY
    assert said.count("last words 143") == 1
    assert "went on" not in said


FINALIZED = """
import os, signal, weakref

class Let: pass

def stop(_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

let = Let()
gone = weakref.ref(let, stop)
try:
    del let
    print("the finalizer ended", file=sys.stderr)
    time.sleep(60)
except signals.Stopped:
    print("stopped", file=sys.stderr)
    os._exit(3)
"""


def test_a_stop_that_is_lost_in_a_finalizer_is_raised_again() -> None:
    script = SCRIPT.format(work=FINALIZED)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.index("the finalizer ended") < done.stderr.rindex("stopped")
    assert "last words" not in done.stderr
    assert "ignored" not in done.stderr


MADE_ANOTHER = """
import os, signal, sys, time
from job.cli import app
from job.pipeline.stages import Stages

def prep(stages, directory):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException:
        raise ModuleNotFoundError("Could not import module 'X'")

Stages.prep = prep
sys.argv = ["job", *sys.argv[1:]]
app.main()
"""


def test_a_stop_of_which_a_library_made_another_error_is_told_as_a_stop(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = small_run(str(output), cache=tmp_path / "cache")
    done = job(*arguments, code=MADE_ANOTHER)
    assert done.code == 143, done.err
    assert "stopped (exit 143)" in done.err
    assert "internal error" not in done.err
    assert read_json(output / "run.json")["status"] == "preempted"


DEFERRED = """
with signals.deferred():
    ready()
    time.sleep(60)
"""


def test_a_checkpoint_that_takes_longer_than_the_grace_period_is_left_with_last_words() -> None:
    process = scripted(DEFERRED, JOB_GRACE_SECONDS="8")
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert time.monotonic() - sent < 8
    assert "the grace period ends before the checkpoint is stored" in said
    assert said.count("last words 143") == 1


def ends_at_the_second_signal(process: "subprocess.Popen[str]") -> None:
    """It goes on after the first signal, and ends at once after the second."""
    process.send_signal(signal.SIGTERM)
    wait_for(process, "stopping after this step")  # two at once would arrive as one
    time.sleep(0.5)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert time.monotonic() - sent < BUSY
    assert "SIGTERM again: exiting immediately" in said


def test_a_second_signal_ends_a_deferred_stop_at_once() -> None:
    ends_at_the_second_signal(scripted(DEFERRED))


HANGING_UPLOAD = """
from job.train.checkpoint.uploads import BackgroundUploads
with signals.deferred(), BackgroundUploads() as uploads:
    uploads.submit(1, lambda: ready() or time.sleep(60))
"""


def test_a_second_signal_does_not_wait_for_a_checkpoint_that_hangs() -> None:
    ends_at_the_second_signal(scripted(HANGING_UPLOAD))


RELAYED = """
import os, signal
with signals.deferred():
    signals.relay()
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("still here", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_stop_that_another_process_relays_is_no_second_signal() -> None:
    # It signals itself: a reader of its first line could take what follows along, and lose it.
    script = SCRIPT.format(work=RELAYED)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    said = done.stderr
    assert done.returncode == 143
    assert said.count("SIGTERM received: stopping after this step") == 1
    assert said.index("still here") < said.index("SIGTERM again: exiting immediately")


IMPORTING = """
import importlib.abc, runpy, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "job.cli.app":
            print("ready", file=sys.stderr, flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
runpy.run_module("job", run_name="__main__")
"""


def test_a_signal_that_comes_while_the_job_is_imported_ends_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    wait_for(process, "ready")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said == "SIGTERM: stopped before the job started\n"


SERVING = """
import sys
from pathlib import Path
from job.export import vllm_server
from job.families.ernie45_vl import Ernie45VL
with vllm_server.serve(Path("."), Ernie45VL, dtype="float16", log_file=Path(sys.argv[1])):
    pass
"""


def test_a_server_does_not_outlive_a_job_that_is_killed(tmp_path: Path) -> None:
    server, said = tmp_path / "python", tmp_path / "log"
    server.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    server.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, str(said)],
        cwd=ROOT,
        env={**os.environ, "JOB_VLLM_PYTHON": str(server)},
    )
    while not (said.exists() and said.read_text().endswith("\n")):
        time.sleep(0.05)
        assert process.poll() is None
    child = Path("/proc", said.read_text().strip())
    assert child.exists()
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 10
    while not has_ended(int(child.name)):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.05)


ORPHAN = """
import os, time
from job import signals
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    print("it starts", flush=True)
    signals.die_with_parent(parent)
    print("it works", flush=True)
"""


def test_a_worker_whose_job_died_before_it_started_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=30
    )
    assert done.stdout == "it starts\n"  # read up to the end, which comes when no process writes


def test_a_signal_to_a_forked_worker_does_not_stop_the_job() -> None:
    fork = """
import os, signal
hear, told = os.pipe()
child = os.fork()
if child == 0:
    os.write(told, b"begun")
    time.sleep(60)
os.read(hear, 5)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
time.sleep(0.5)
"""
    script = SCRIPT.format(work=fork)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "went on" in done.stderr


@pytest.fixture
def as_pid_1() -> list[str]:
    """The command that runs another as the first process of a PID namespace of its own."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("this machine gives no PID namespace")
    return command


def test_sigterm_stops_a_job_that_is_pid_1(as_pid_1: list[str], tmp_path: Path) -> None:
    arguments = small_run(str(tmp_path / "out"), "--set", "data.train.limit=100000", cache=tmp_path)
    process = subprocess.Popen(
        [*as_pid_1, sys.executable, "-m", "job", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    wait_for(process, "prep: started")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [first] = [int(child) for child in children]
    assert b"NSpid" in Path(f"/proc/{first}/status").read_bytes()
    sent = time.monotonic()
    os.kill(first, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert time.monotonic() - sent < SECONDS + BUSY
    assert read_json(tmp_path / "out" / "run.json")["status"] == "preempted"
