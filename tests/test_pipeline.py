"""What a pipeline promises under faults: killed, hung, edited, started twice, it is honest and does nothing twice."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import nbformat
import psutil
import pytest

from workbench.errors import ParameterError, PipelineError, WorkbenchError
from workbench.pipeline import records, runner, session, steps
from workbench.pipeline.plan import load_pipeline, plan_jobs
from workbench.pipeline.records import list_runs, read_run
from workbench.pipeline.runner import StepFailure
from workbench.pipeline.runs import resume, run_pipeline
from workbench.pipeline.steps import CONTEXT, finished_step
from workbench.settings import load_settings

OWN = {"WORKBENCH_PATHS_HOME": "home", "WORKBENCH_PATHS_PIPELINES": "."}   # relative: a bench can be copied
NEEDS = {"one": [], "two": ["one"], "three": ["two"], "four": ["one"], "five": ["three", "four"]}

# What every step does: says that it has begun, hangs when it is told to, and leaves a text made of those before it.
BEGUN = "with open('begun', 'a') as file: file.write(f'{step.name} ')"
HANG = """
import subprocess, time
from pathlib import Path
if Path("hang").exists() and Path("hang").read_text() == step.name:
    (step.folder/"half.txt").write_text("half")
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path("inside").touch()
    while not Path("go").exists(): time.sleep(0.05)
"""
WORK = """
before = "".join((step.input(name)/"out.txt").read_text() for name in sorted(step.inputs))
(step.folder/"out.txt").write_text(before + step.name*amount)
"""
DONE = "step.done(length=len(before), text=text)"

WORKER = "workbench.pipeline.worker"   # in the command lines of a step's worker and of its kernel

# A runner in a process of its own, which can be killed.
HEAD = f"""
import os, sys
from workbench.pipeline import runner, runs, session
from workbench.settings import load_settings
chosen = load_settings(root=sys.argv[1], environment={OWN!r})
def die_after(module, name):
    real = getattr(module, name)
    def call(*arguments):
        real(*arguments)
        os.kill(os.getpid(), 9)
    setattr(module, name, call)
"""
RUN, RESUME = HEAD + "runs.run_pipeline('small', chosen=chosen)", HEAD + "runs.resume(chosen=chosen)"


class Bench:
    "A folder with a pipeline called small, its notebooks and a home of its own."

    def __init__(self, folder: Path):
        self.folder, self.home = folder, folder / "home"
        self.chosen = load_settings(root=folder, environment=OWN)

    def write(self, name: str, *sources: str, parameters: str = "amount: int = 2\ntext: str = ''") -> None:
        "Write a step's notebook; its third cell is the first of `sources`."
        begin = f"from workbench.pipeline.steps import Step\nstep = Step.begin({name!r})"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in (parameters, begin, *sources)])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(notebook, self.folder / f"{name}.ipynb")

    def write_all(self, needs: dict[str, list[str]]) -> "Bench":
        "Write a pipeline of well-behaved steps."
        for name in needs:
            self.write(name, BEGUN, HANG, WORK, DONE)
        return self.card("".join(f"[steps.{name}]\nneeds = {each}\n" for name, each in needs.items()))

    def card(self, text: str) -> "Bench":
        "Write the pipeline's file."
        (self.folder / "small.toml").write_text(text)
        return self

    def edit(self, name: str, kind: str, text: str) -> None:
        "Add a text to a notebook: a cell of code or markdown, or more lines of the last cell."
        path = self.folder / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        if kind == "lines":
            notebook.cells[-1].source += text
        else:
            notebook.cells.insert(-1, getattr(nbformat.v4, f"new_{kind}_cell")(text))
        nbformat.write(notebook, path)

    def run(self, **parameters):
        return run_pipeline("small", parameters, chosen=self.chosen)

    def resume(self):
        return resume(chosen=self.chosen)

    def latest(self):
        return read_run("latest", self.home)

    def begun(self) -> dict[str, int]:
        "Count how often each step was executed."
        path = self.folder / "begun"
        return dict(Counter(path.read_text().split())) if path.exists() else {}

    def published(self) -> set[str]:
        "Return the steps for which anything stands under a final name."
        return {path.parent.name for path in self.home.glob("steps/*/*") if not path.name.startswith(".")}

    def start(self, code: str = RUN, **environment: str) -> subprocess.Popen:
        "Start a process that runs or resumes the pipeline."
        return subprocess.Popen([sys.executable, "-c", code, str(self.folder)], stderr=subprocess.PIPE, text=True,
                                env=os.environ | environment)

    def start_and_hang(self, step: str, code: str = RUN, **environment: str) -> subprocess.Popen:
        "Start a process and return when it is inside a step, with the half of a result written."
        (self.folder / "hang").write_text(step)
        (self.folder / "inside").unlink(missing_ok=True)
        process, deadline = self.start(code, **environment), time.monotonic() + 240
        while not (self.folder / "inside").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.02)
        return process

    def family(self, words: str = "") -> list[psutil.Process]:
        "Return every process that was started for a step of this bench, with these words in its command line."
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(CONTEXT, "").startswith(f"{self.home}/")
                if ours and words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def is_left_alone(self, words: str = "", seconds: float = 15) -> bool:
        "Tell whether every such process ends within some seconds."
        deadline = time.monotonic() + seconds
        while self.family(words) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.family(words)

    def litter(self) -> list[Path]:
        "Return everything that a dead run left and the next start must remove."
        found = [*self.home.rglob("*.partial"), *self.home.rglob("half.txt")]
        for run in list_runs(self.home):
            found += Path(tempfile.gettempdir()).glob(f"workbench-{run.run_id}-*")
        return found


def ended(process: subprocess.Popen) -> int:
    "Wait for a process and return its exit code."
    process.communicate(timeout=240)
    return process.returncode


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> int:
    "End a process and return its exit code."
    process.send_signal(number)
    return ended(process)


def statuses(run) -> dict[str, str]:
    return {step.name: step.status for step in run.steps}


@pytest.fixture
def bench(tmp_path):
    "An empty bench; what a test leaves running is ended."
    made = Bench(tmp_path)
    yield made
    for process in made.family():
        process.kill()
    for folder in made.litter():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A bench whose five steps have run: to be copied, not to be changed."
    made = Bench(tmp_path_factory.mktemp("finished")).write_all(NEEDS)
    run = made.run(**GIVEN)
    assert set(statuses(run).values()) == {"succeeded"} and made.litter() == []
    return made


@pytest.fixture
def copy(finished, tmp_path):
    "A copy of the finished bench in which nothing has been counted."
    shutil.copytree(finished.folder, tmp_path / "copy")
    (tmp_path / "copy" / "begun").unlink()
    return Bench(tmp_path / "copy")


HOSTILE = "'''; open('broken-in', 'w') #\n\\\"{{}}"
GIVEN = {"two.amount": "3", "text": HOSTILE}


@pytest.mark.slow
def test_a_run_killed_inside_its_steps_goes_on_and_repeats_only_the_unfinished(bench, monkeypatch):
    bench.write_all(NEEDS)
    for code, step in ((RUN, "one"), (RESUME, "three"), (RESUME, "five")):
        process = bench.start_and_hang(step, code)
        assert len(bench.family()) == 3, "the worker, the kernel, and what the cell started"
        assert kill(process) == -signal.SIGKILL and bench.is_left_alone()
        run = bench.latest()
        assert (run.status, run[step].status) == ("killed", "killed")
        assert bench.published() == set(bench.begun()) - {step}
        assert bench.litter(), "the control: there is something to remove"
    with monkeypatch.context() as patch:
        patch.setattr(records, "owner_lives", lambda owner: True)
        assert bench.latest().status == "running", "the control: the record alone would be a lie"
    (bench.folder / "hang").unlink()
    run = bench.resume()
    assert (run.status, set(statuses(run).values())) == ("succeeded", {"succeeded"}) and len(list_runs(bench.home)) == 1
    assert bench.begun() == {"one": 2, "two": 1, "three": 2, "four": 1, "five": 2}
    assert {step.name: step.attempts for step in run.steps} == bench.begun()
    assert bench.family() == [] and bench.litter() == []
    assert (Path(run["three"].folder) / "out.txt").read_text() == "oneonetwotwothreethree"


@pytest.mark.slow
def test_a_run_killed_just_before_and_just_after_a_step_is_published_goes_on(bench):
    bench.write_all({"one": []})
    before, after = ("die_after(runner, 'write_record')\n", "die_after(session, 'run_step')\n")
    for code, published in ((before + "runs.run_pipeline('small', chosen=chosen)", set()),
                            (after + "runs.resume(chosen=chosen)", {"one"})):
        assert ended(bench.start(HEAD + code)) == -signal.SIGKILL
        assert bench.latest()["one"].status == "killed" and bench.published() == published
    assert statuses(bench.resume()) == {"one": "skipped"} and bench.latest().status == "succeeded"
    assert bench.begun() == {"one": 2} and bench.litter() == []


# A worker that is told to end while it is ending: a dying parent sends its signal once for each of its threads.
TWICE = """
import os, signal, subprocess, sys, time
from workbench.pipeline import worker
class Again:
    def find_spec(self, name, path=None, target=None):
        if name == "psutil._pslinux": os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Again())
signal.signal(signal.SIGTERM, worker.end_everything)
subprocess.Popen(["sleep", "600"], stderr=subprocess.DEVNULL)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(600)
"""


def test_a_worker_that_is_ended_twice_leaves_nothing_alive(bench):
    process = bench.start(TWICE, **{CONTEXT: f"{bench.home}/context.json"})
    assert ended(process) == 128 + signal.SIGTERM and bench.is_left_alone(seconds=1)


@pytest.mark.slow
def test_what_outlives_its_runner_is_ended_by_the_next_start(bench):
    "The control of the kills above: without the signal at the parent's death, worker and kernel go on."
    bench.write_all({"one": []})
    (bench.folder / "sitecustomize.py").write_text(
        "import ctypes\nclass Deaf(ctypes.CDLL):\n    prctl = staticmethod(lambda *arguments: 0)\nctypes.CDLL = Deaf\n")
    path = os.pathsep.join([str(bench.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert kill(bench.start_and_hang("one", PYTHONPATH=path)) == -signal.SIGKILL
    assert not bench.is_left_alone(seconds=2) and len(bench.family()) == 3
    session.clear_up(bench.home)
    assert bench.is_left_alone() and bench.litter() == []
    assert json.loads((bench.latest().folder / "run.json").read_text())["status"] == "killed"


def test_a_record_that_was_half_written_at_a_kill_is_swept_by_the_next_start(bench):
    bench.write_all({"one": []})
    code = "from workbench import files\nfiles.os.replace = lambda *names: os.kill(os.getpid(), 9)\n"
    assert ended(bench.start(HEAD + code + "runs.run_pipeline('small', chosen=chosen)")) == -signal.SIGKILL
    assert bench.litter() and bench.published() == set() and list_runs(bench.home) == []
    session.clear_up(bench.home)
    assert bench.litter() == []


@pytest.mark.slow
def test_a_terminated_run_clears_up_after_itself_and_says_killed(bench):
    bench.write_all({"one": [], "two": ["one"]})
    assert kill(bench.start_and_hang("one"), signal.SIGTERM) != 0
    assert bench.family() == [] and bench.litter() == [] and bench.published() == set()
    assert bench.latest().status == "killed" and statuses(bench.latest()) == {"one": "killed", "two": "waiting"}


FAULTS = {   # cells after the second, where it fails, why
    "a cell that raises": (["step.done(); 1/0"], 3, "ZeroDivisionError: division by zero"),
    "sys.exit": (["import sys; sys.exit(0)", "step.done()"], 3, r"the notebook was left with sys.exit\(0\)"),
    "a dead kernel": (["import os, time; time.sleep(1); os.kill(os.getpid(), 9)", "step.done()"], 3, "DeadKernelError: Kernel died"),
    "a dead worker": (["import os; os.kill(os.getppid(), 9)", "step.done()"], 3, r"its process was ended \(SIGKILL\)"),
    "no done": (["done = True"], None, r"it ran to its end without step.done\(...\)"),
    "files changed after done": (
        ["(step.folder/'out').touch(); step.done()", "(step.folder/'out').write_text('y'); (step.folder/'z').touch()"],
        None, r"its files are not what it called done \(z was added; out was changed\)"),
    "a process that goes on writing": (
        ["import subprocess, time",
         "line = ['sh', '-c', 'while true; do date >> log; sleep 0.01; done']",
         "subprocess.Popen(line, cwd=step.folder, start_new_session=True); time.sleep(0.5); step.done()"],
        None, r"its files are not what it called done \(log was changed\)")}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_does_not_finish_is_a_failure_with_its_place_named_and_leaves_nothing(bench, fault):
    sources, cell, why = FAULTS[fault]
    bench.write("make", *sources)
    bench.write("take", BEGUN, "step.done()")
    bench.card("[steps.make]\ntimeout = '300s'\n[steps.take]\nneeds = ['make']")
    with pytest.raises(StepFailure, match=f"step make failed.*: {why}.*then workbench resume") as failure:
        bench.run()
    run = bench.latest()
    assert failure.value.exit_code == 1 and run.status == "failed"
    assert statuses(run) == {"make": "failed", "take": "waiting"} and bench.begun() == {}
    assert bench.published() == set() and bench.litter() == [] and bench.family() == []
    if cell:
        assert (run["make"].cell, run["make"].source) == (cell, sources[0])
        assert f"in cell {cell} ({sources[0]})" in str(failure.value)


@pytest.mark.slow
def test_a_hung_cell_is_ended_and_named(bench):
    bench.write("make", "import time; time.sleep(600)", "step.done()")
    for limit in (8, 20, 50):   # on a busy machine the kernel alone may take longer than the first limit
        bench.card(f"[steps.make]\ntimeout = '{limit}s'")
        with pytest.raises(StepFailure, match=f"it took longer than its {limit} seconds and was ended"):
            bench.run()
        assert bench.published() == set() and bench.litter() == [] and bench.family() == []
        if bench.latest()["make"].cell:
            break
    assert (bench.latest()["make"].cell, bench.latest()["make"].source) == (3, "import time; time.sleep(600)")


def test_papermill_by_itself_calls_half_a_notebook_a_success(bench):
    "The control of the failures above: the guard is ours, and still needed."
    from papermill import execute_notebook

    bench.write("make", "import sys; sys.exit(0)", "open('late', 'w')")
    source, here = str(bench.folder / "make.ipynb"), str(bench.folder)
    execute_notebook(source, None, kernel_name="python3", progress_bar=False, cwd=here)
    assert not (bench.folder / "late").exists()


@pytest.mark.parametrize(("given", "message"), [
    ({"amuont": 3}, "pipeline small has no parameter 'amuont': did you mean 'amount'"),
    ({"two.amuont": 3}, "pipeline small has no parameter 'two.amuont': did you mean 'two.amount'"),
    ({"six.amount": 3}, "has no parameter 'six.amount'"),
    ({"amount = 1; open('broken-in', 'w') #": 1}, "has no parameter"),
    ({"amount": "many"}, "step one: amount is 'many', which is not a valid int: write it like amount=2"),
    ({"two.amount": 2.5}, "step two: amount is 2.5, which is not a valid int"), ({"amount": True}, "amount is True"),
    ({"amount": None}, "amount is None"), ({"text": 7}, "step one: text is 7, which is not a valid str")])
def test_a_bad_parameter_is_an_error_before_anything_runs(bench, given, message):
    bench.write_all(NEEDS)
    with pytest.raises(ParameterError, match=message):
        bench.run(**given)
    assert not bench.home.exists() and bench.begun() == {} and not (bench.folder / "broken-in").exists()


def test_a_parameter_of_the_file_that_no_notebook_declares_is_an_error_before_anything_runs(bench):
    bench.write_all({"one": []}).card("[steps.one]\nparameters = { amuont = 3 }")
    with pytest.raises(ParameterError, match="step one has no parameter 'amuont': did you mean 'amount'"):
        bench.run()
    assert not bench.home.exists()


@pytest.mark.slow
def test_a_good_parameter_arrives_as_it_was_written(finished):
    folder = Path(finished.latest()["two"].folder)
    assert (folder / "out.txt").read_text() == "oneone" + "two" * 3
    assert json.loads((folder / "step.json").read_text())["facts"]["text"] == HOSTILE
    assert not (finished.folder / "broken-in").exists()


@pytest.mark.slow
def test_of_two_runs_at_once_the_second_leaves_naming_the_owner(bench, monkeypatch):
    bench.write_all({"one": []})
    process = bench.start_and_hang("one")
    with pytest.raises(WorkbenchError, match=f"pipeline small is in use by process {process.pid}: wait for it to end"):
        bench.run()
    with pytest.raises(PipelineError, match=f"is still running in process {process.pid}: wait for it to end"):
        bench.resume()
    assert len(list_runs(bench.home)) == 1 and bench.latest().status == "running" and len(bench.family()) == 3
    assert bench.begun() == {"one": 1}
    (bench.folder / "hang").unlink()
    for module in (session, runner):
        monkeypatch.setattr(module, "hold_lock", lambda *arguments, **options: nullcontext())
    bench.run()
    assert bench.begun() == {"one": 2}, "the control: the locks are what sent it away"
    (bench.folder / "go").touch()
    assert ended(process) == 0 and {run.status for run in list_runs(bench.home)} == {"succeeded"}


DEPENDANTS = {"one": set(NEEDS), "two": {"two", "three", "five"}, "three": {"three", "five"}, "four": {"four", "five"},
              "five": {"five"}}


@pytest.mark.parametrize("step", NEEDS)
def test_an_edit_gives_new_names_to_the_outputs_of_exactly_the_step_and_its_dependants(bench, step):
    pipeline = load_pipeline("small", bench.write_all(NEEDS).chosen)
    before = plan_jobs(pipeline, {}, bench.chosen)
    bench.edit(step, "code", "more = 1")
    after = plan_jobs(pipeline, {}, bench.chosen)
    assert {name for name in NEEDS if before[name].fingerprint != after[name].fingerprint} == DEPENDANTS[step]


@pytest.mark.slow
def test_an_edited_step_runs_again_with_its_dependants_and_nothing_else(copy):
    copy.edit("four", "code", "more = 1")
    run = copy.run(**GIVEN)
    assert copy.begun() == {"four": 1, "five": 1}
    assert [step.status for step in run.steps] == ["skipped", "skipped", "skipped", "succeeded", "succeeded"]
    assert (run["four"].reason, run["five"].reason) == ("changed: cells", "changed: upstream four")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), [("markdown", "## Why"), ("lines", "\n\n# a remark"), ("code", "  ")])
def test_words_about_a_step_run_nothing_again(copy, kind, text):
    copy.edit("one", kind, text)
    assert set(statuses(copy.run(**GIVEN)).values()) == {"skipped"} and copy.begun() == {}


@pytest.mark.slow
def test_a_second_run_skips_everything(copy):
    run = copy.run(**GIVEN)
    assert (run.status, set(statuses(run).values())) == ("succeeded", {"skipped"}) and copy.begun() == {}
    assert all(step.folder and step.seconds for step in run.steps)


def output_of(bench: Bench, step: str) -> Path:
    "Return the only output folder of a step."
    [folder] = (bench.home / "steps" / step).iterdir()
    return folder


@pytest.mark.slow
def test_a_step_whose_file_was_changed_runs_again_and_only_that(copy):
    path = output_of(copy, "three") / "out.txt"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    run = copy.run(**GIVEN)
    assert copy.begun() == {"three": 1} and run["three"].reason == "its files were changed"
    assert path.read_bytes() == whole and [step.status for step in run.steps].count("skipped") == 4


@pytest.mark.slow
def test_a_step_with_a_file_missing_or_added_does_not_count_as_finished(copy):
    (output_of(copy, "two") / "out.txt").unlink()
    (output_of(copy, "four") / "more.txt").touch()
    assert [name for name in NEEDS if not finished_step(output_of(copy, name))] == ["two", "four"]


@pytest.mark.slow
def test_the_checksums_are_what_finds_a_changed_file(copy, monkeypatch):
    "The negative control: with verification switched off the flipped byte is served."
    (output_of(copy, "three") / "out.txt").write_text("flipped")
    monkeypatch.setattr(steps, "verify", lambda *arguments, **options: [])
    assert set(statuses(copy.run(**GIVEN)).values()) == {"skipped"}


@pytest.mark.slow
def test_a_step_that_fails_once_and_has_a_retry_succeeds_on_its_second_attempt(bench):
    bench.write("make", BEGUN, "times = len(open('begun').read().split())\n(step.folder/f'time {times}').touch()",
                "import os\nassert times > 1, 'the first time'\nstep.done(files=os.listdir(step.folder))")
    seen = []
    run = run_pipeline("small", on_event=seen.append, chosen=bench.card("[steps.make]\nretries = 1").chosen)
    assert [event["event"] for event in seen if "record" in event] == ["running", "failed", "running", "succeeded"]
    assert (run.status, run["make"].status, run["make"].attempts) == ("succeeded", "succeeded", 2)
    assert (run["make"].error, run["make"].cell) == ("", None) and bench.begun() == {"make": 2} and bench.litter() == []
    facts = json.loads((Path(run["make"].folder) / "step.json").read_text())["facts"]
    assert facts == {"files": ["time 2"]}, "nothing of the first attempt is left"


@pytest.mark.slow
def test_a_step_that_was_told_something_wrong_is_not_tried_again(bench):
    bench.write("make", BEGUN, "from workbench.errors import UsageError\nraise UsageError('size is huge: choose small')")
    with pytest.raises(StepFailure, match="size is huge: choose small; run it again with another value"):
        run_pipeline("small", chosen=bench.card("[steps.make]\nretries = 1").chosen)
    assert bench.begun() == {"make": 1}


@pytest.mark.slow
def test_the_checksum_of_everything_a_step_left_verifies(finished):
    found = list(finished.home.glob("steps/*/*/step.json"))
    assert sorted(path.parent.parent.name for path in found) == sorted(NEEDS)
    for path in found:
        told = json.loads(path.read_text())["sha256"]
        files = [each for each in path.parent.iterdir() if each != path]
        assert told == {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
        assert set(told) == {"out.txt", "notebook.ipynb"}


@pytest.mark.slow
def test_a_run_record_says_where_everything_is(finished):
    run = finished.latest()
    for step in run.steps:
        assert Path(step.folder).name == step.fingerprint and nbformat.read(step.notebook, as_version=4).cells
    assert run.ended and not (run.folder / "contexts").exists() and finished.family() == []
