"""Variants: what is wrong is refused with its reason, what is right is the model, and the bench tells the two apart."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from workbench.data.histories import pack
from workbench.errors import BackendError, UnknownNameError, UsageError, WorkbenchError
from workbench.files import hold_lock
from workbench.models.baselines import Blend, Neighbours, fit_item_knn, fit_popularity
from workbench.models.ranker import known_models, save_model
from workbench.models.sequential import SASRec
from workbench.optimization.backends import Backend, OnnxRuntime, backends
from workbench.optimization.benchmark import Rival, bench
from workbench.optimization.choose import Gate, VariantTable
from workbench.optimization.export import MAX_BATCH, TopK, example_inputs, export_program
from workbench.optimization.quality import kept_share
from workbench.optimization.variants import Variant, check_parity, compile_variant
from workbench.optimization.worker import Worker, draw_cases
from workbench.settings import settings

N_ITEMS, LENGTH, K = 150, 12, 10
BACKENDS = ["eager", "inductor", "onnxruntime", "openvino"]
ASKED = {"backends": ["eager"], "compressions": ["none"], "k": K, "threads": 1, "progress": False}


def sasrec(seed=0):
    torch.manual_seed(seed)
    model = SASRec(n_items=N_ITEMS, length=LENGTH, width=16).eval()
    with torch.no_grad():
        model.items.weight[1:].normal_()
    return model


def histories(users=40, events=16):
    draw = np.random.default_rng(0)
    items = draw.integers(0, N_ITEMS, users * events)
    items[:N_ITEMS] = np.arange(N_ITEMS)
    return pack("walks", np.repeat(np.arange(users), events), items, np.arange(users * events), np.arange(users).astype(str),
                np.arange(N_ITEMS).astype(str), exclude_seen=True)


def expected(model, inputs, k=K):
    with torch.inference_mode():
        return [x.numpy() for x in TopK(model, k)(*inputs)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    "One variant of each backend, of one model; a backend that is not here skips its tests with its reason."
    folder, made = tmp_path_factory.mktemp("variants"), {}

    def get(name):
        if reason := backends[name].available():
            pytest.skip(reason)
        if name not in made:
            made[name] = compile_variant(sasrec(), folder / name, name, k=K)
        return made[name]

    return get


@pytest.mark.parametrize("name", BACKENDS)
def test_a_variant_answers_like_the_model_at_any_batch_and_any_number_of_exclusions(compiled, name):
    answer = compiled(name).callable(threads=1)
    for batch, excluded in ((1, 1), (33, 60), (1, N_ITEMS), (3, 500), (MAX_BATCH, 7)):
        inputs = example_inputs(LENGTH, N_ITEMS, batch, excluded, seed=batch)
        inputs[2][:, 100:] = 0
        ids, scores = answer(*(x.numpy() for x in inputs))
        wanted_ids, wanted_scores = expected(sasrec(), inputs)
        np.testing.assert_array_equal(ids, wanted_ids)
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)
        assert not (ids[:, :, None] == inputs[2].numpy()[:, None]).any()


@pytest.mark.parametrize("name", BACKENDS)
def test_what_cannot_be_answered_is_a_typed_error_and_the_next_call_is_right(compiled, name):
    answer = compiled(name).callable()
    items, lengths, exclude = (x.numpy() for x in example_inputs(LENGTH, N_ITEMS))
    bad = {
        "batch of 0": (items[:0], lengths[:0], exclude[:0]),
        "batch of 257": tuple(np.repeat(x[:1], MAX_BATCH + 1, axis=0) for x in (items, lengths, exclude)),
        "2 lengths": (items, lengths[:2], exclude),
        f"have {LENGTH - 1} columns": (items[:, :-1], lengths, exclude),
        f"have {LENGTH + 1} columns": (np.pad(items, ((0, 0), (1, 0)), mode="edge"), lengths, exclude),
        "outside the catalogue": (np.where(items > 0, N_ITEMS + 1, 0), lengths, exclude),
        "an item index": (items, lengths, np.full_like(exclude, -1)),
        "empty history": (items * 0, lengths * 0, exclude),
        "gaps": (items * 0, lengths, exclude),
        "int64": (items.astype(np.float32), lengths, exclude),
        "excluded items": (items, lengths, exclude[:, :0]),
    }
    for message, inputs in bad.items():
        with pytest.raises(BackendError, match=message):
            answer(*inputs)
    np.testing.assert_array_equal(answer(items, lengths, exclude)[0],
                                  expected(sasrec(), [torch.from_numpy(x) for x in (items, lengths, exclude)])[0])


class Swapped(OnnxRuntime):
    "A backend with a bug: it reads the vectors of items 1 and 2 the wrong way round."

    name = "swapped"

    def compile(self, program, folder, threads=1):
        model = sasrec()
        with torch.no_grad():
            model.items.weight[[1, 2]] = model.items.weight[[2, 1]]
        super().compile(export_program(model, K), folder, threads)


class NotANumber(OnnxRuntime):
    "A backend with another bug: its scores are not numbers."

    name = "not_a_number"

    def load(self, folder, threads=1):
        run = super().load(folder, threads)
        return lambda *inputs: (lambda ids, scores: (ids, scores * np.nan))(*run(*inputs))


class Absent(Backend):
    "A backend that is not installed."

    name, needs = "absent", ("no_such_library",)


@pytest.fixture
def broken():
    "Backends with faults, registered while a test runs."
    for backend in (Swapped(), NotANumber(), Absent()):
        backends.register(backend.name, backend)
    yield
    for name in ("swapped", "not_a_number", "absent"):
        del backends[name]


@pytest.mark.parametrize(("name", "reason"), [("swapped", "parity"), ("not_a_number", "not finite"), ("absent", "pip install")])
def test_a_wrong_variant_is_refused_and_leaves_nothing(broken, tmp_path, name, reason):
    with pytest.raises(BackendError, match=reason):
        compile_variant(sasrec(), tmp_path / "v", name, k=K)
    assert list(tmp_path.iterdir()) == []


def test_parity_is_what_refuses_a_wrong_variant(broken, tmp_path, monkeypatch):
    "With the guard off, the same fault gets through: the test above tests the guard."
    monkeypatch.setattr("workbench.optimization.variants.check_parity", lambda *_: None)
    wrong = compile_variant(sasrec(), tmp_path / "v", "swapped", k=K)
    with pytest.raises(BackendError, match="parity"):
        check_parity(wrong.callable(), TopK(sasrec(), K), 1.0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "added", "record"])
def test_a_damaged_variant_is_refused(tmp_path, damage):
    folder = compile_variant(sasrec(), tmp_path / "v", "onnxruntime", k=K).folder
    file = folder / "model.onnx"
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[:-100])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "added":
        (folder / "more.bin").write_bytes(b"x")
    else:
        (folder / "variant.json").write_text('{"backend": "onnxruntime"')
    with pytest.raises(BackendError, match="compile it again"):
        Variant.load(folder)


@pytest.mark.parametrize("wrong", [{"files": 3}, {"files": None}, {"files": ["a"]}, {"processor": None}, {"versions": "1"},
                                   {"k": "10"}, {"lineage": [3]}, {"lineage": [{}]}, {"seconds": "long"}, {"more": 1}], ids=str)
def test_a_record_with_a_wrong_type_is_refused_in_a_sentence(compiled, tmp_path, wrong):
    folder = Path(shutil.copytree(compiled("eager").folder, tmp_path / "v"))
    record = json.loads((folder / "variant.json").read_text())
    (folder / "variant.json").write_text(json.dumps(record | wrong))
    with pytest.raises(BackendError, match=r"is not a variant \(.*\): compile it again"):
        Variant.load(folder)


def test_a_variant_made_for_another_processor_is_refused(tmp_path):
    folder = compile_variant(sasrec(), tmp_path / "v", "onnxruntime", k=K).folder
    record = json.loads((folder / "variant.json").read_text())
    (folder / "variant.json").write_text(json.dumps(record | {"processor": "avx512_of_tomorrow"}))
    with pytest.raises(BackendError, match="avx512_of_tomorrow"):
        Variant.load(folder)


def test_a_build_that_is_killed_leaves_no_variant_and_can_be_repeated(tmp_path):
    save_model(sasrec(), tmp_path / "model")
    code = (f"from workbench.models.ranker import load_model; from workbench.optimization.variants import compile_variant;"
            f"print('compiling', flush=True); compile_variant(load_model({str(tmp_path / 'model')!r}), {str(tmp_path / 'v')!r}, 'openvino')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".v.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "v").exists()
    assert compile_variant(sasrec(), tmp_path / "v", "onnxruntime", k=K).name == "onnxruntime"


class Exotic(SASRec):
    "A model with an operator that no runtime has but PyTorch."

    def encode(self, items, lengths):
        return torch.special.airy_ai(super().encode(items, lengths))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "executorch"])
def test_an_operator_that_a_backend_does_not_know_is_a_reason(tmp_path, name):
    torch.manual_seed(0)
    with pytest.raises(BackendError, match="airy_ai"):
        compile_variant(Exotic(n_items=N_ITEMS, length=LENGTH, width=16).eval(), tmp_path / "v", name, k=K)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("k", [1, 5])
def test_a_short_list_that_need_not_be_exact_has_a_floor_too(tmp_path, k):
    assert compile_variant(sasrec(), tmp_path / "v", "onnxruntime", "int8_dynamic", k=k).k == k

    def worst(*inputs):
        with torch.inference_mode():
            exact = TopK(sasrec(), k).masked(*map(torch.from_numpy, inputs)).numpy()
        ids = np.argsort(np.where(np.isfinite(exact), exact, np.inf), axis=1)[:, :k][:, ::-1]
        return ids, np.take_along_axis(exact, ids, axis=1)

    with pytest.raises(BackendError, match="survived"):
        check_parity(worst, TopK(sasrec(), k), 0.5, same=False)


@pytest.mark.parametrize("kind", ["popularity", "neighbours", "blend"])
def test_baselines_and_blends_compile_like_any_model(tmp_path, kind):
    data = histories()
    knn = fit_item_knn(data.train, length=5)
    model = {"popularity": fit_popularity(data.train), "neighbours": knn, "blend": Blend([sasrec(), knn], [0.7, 0.3]).eval()}[kind]
    variant = compile_variant(model, tmp_path / "v", "onnxruntime", k=K)
    inputs = example_inputs(variant.length, N_ITEMS, 9, 20)
    ids, scores = variant.callable()(*(x.numpy() for x in inputs))
    with torch.inference_mode():
        exact = TopK(model, K).masked(*inputs).numpy()
    np.testing.assert_allclose(np.take_along_axis(exact, ids, 1), expected(model, inputs)[1], atol=1e-4)
    np.testing.assert_allclose(scores, expected(model, inputs)[1], atol=1e-4)


def test_the_bench_measures_what_works_and_gives_reasons_for_the_rest(broken, tmp_path):
    table = bench(sasrec(), histories(), tmp_path, backends=["onnxruntime", "absent", "eager"], k=K, rounds=2, progress=False)
    rows = {row["variant"]: row for row in table.rows}
    assert rows["absent"]["status"] == "missing" and "no_such_library is not installed" in rows["absent"]["reason"]
    for name in ("onnxruntime", "onnxruntime+int8_scan", "eager"):
        row = rows[name]
        assert row["status"] == "ok", row["reason"]
        assert row["ndcg_low"] <= row["ndcg_share"] <= row["ndcg_high"]
        assert all(row[figure] > 0 for figure in ("ratio", "throughput_1", "throughput_8", "throughput_32", "cpu", "memory", "size"))
        assert 0 < row["p50"] <= row["p95"] <= row["p99"] and 0 < row["load"] < row["first"]
    assert rows["onnxruntime"]["agreement"] == rows["eager"]["agreement"] == rows["reference"]["agreement"] == 1.0
    assert rows["onnxruntime"]["ndcg"] == rows["reference"]["ndcg"]
    assert rows["onnxruntime"]["memory"] < rows["reference"]["memory"], "a service of this variant loads no PyTorch"
    read = VariantTable.load(tmp_path)
    assert read == table and {"processor", "cores", "instruction_sets", "versions"} <= set(read.facts)
    assert read.choose(Gate(ndcg=0.0)).folder == tmp_path / "variants" / read.decide(Gate(ndcg=0.0)).variant
    assert read.choose(Gate(ndcg=1.4)).name == "eager", "nothing passes: the uncompiled program, and the reason is said"
    assert "no variant passed" in read.decide(Gate(ndcg=1.4)).reason


class Dying(Worker):
    "A worker whose process is killed when it is to be timed, as one that needs too much memory is; not the reference's."

    opened: ClassVar[list[Worker]] = []

    def ask(self, task, timeout=300.0, **request):
        if task == "load":
            self.opened.append(self)
        if task == "latency" and self is not self.opened[0]:
            self.process.kill()
            self.process.wait()
        return super().ask(task, timeout, **request)


def test_a_process_that_ends_between_two_questions_is_a_reason_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.optimization.benchmark.Worker", Dying)
    Dying.opened.clear()
    reference, eager = bench(sasrec(), histories(), tmp_path, **ASKED, rounds=2).rows
    assert reference["rounds"] == 2 and eager["status"] == "failed" and eager["reason"] == "its process had ended before latency"


def test_measuring_stops_when_the_budget_is_used_up(tmp_path):
    reference, eager = bench(sasrec(), histories(), tmp_path, **ASKED, rounds=50, minutes=0, smaller=["distilled"]).rows[:2]
    assert reference["rounds"] == 2 and "budget of 0 minutes was used up" in eager["reason"]


def test_there_is_no_training_without_time(tmp_path):
    row = bench(sasrec(), histories(), tmp_path, **ASKED, rounds=1, minutes=0, smaller=["distilled"]).rows[-1]
    assert row["status"] == "failed" and row["reason"] == "there is no time to train it: raise the budget of minutes"
    assert not (tmp_path / "smaller").exists()


def test_a_folder_takes_one_bench_at_a_time(tmp_path):
    with hold_lock(tmp_path / "bench.lock", "the bench"), pytest.raises(WorkbenchError, match=r"is in use by process \d+: wait"):
        bench(sasrec(), histories(), tmp_path, **ASKED)


def test_two_of_one_name_are_refused_and_not_measured_as_one(compiled, tmp_path):
    rival = Rival("eager", compiled("eager").folder, draw_cases(histories().test, LENGTH))
    with pytest.raises(UsageError, match="called eager: give each step, and a rival, a name of its own"):
        bench(sasrec(), histories(), tmp_path, **ASKED, rival=rival)


def test_who_has_heard_more_than_a_variant_takes_is_asked_all_the_same():
    count = 66_000
    data = pack("ears", np.zeros(count + 3, np.int64), np.r_[np.arange(count), 0, 1, 2], np.arange(count + 3), np.array(["one"]),
                np.arange(count).astype(str), exclude_seen=True)
    assert draw_cases(data.test, LENGTH).batch(0, 1)[2].shape == (1, 65_536)


def alive(pid):
    "Tells whether a process runs; one that has ended and that nobody has waited for does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_busy_worker_ends_with_its_parent(tmp_path):
    if reason := backends["inductor"].available():
        pytest.skip(reason)
    save_model(sasrec(), tmp_path / "model")
    code = (f"import json, os; from workbench.optimization.worker import Worker; worker = Worker();"
            f"worker.process.stdin.write(json.dumps(dict(task='compile', model={str(tmp_path / 'model')!r}, threads=1, backend='inductor',"
            f" folder={str(tmp_path / 'v')!r})).encode() + b'\\n'); worker.process.stdin.flush();"
            f"print(worker.process.pid, flush=True); os._exit(1)")
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid) and not (tmp_path / "v").exists()


@pytest.mark.parametrize("text", ["{}", "[]", '{"rows": []}'])
def test_a_table_that_is_none_is_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(BackendError, match=r"table\.json is not the table of a bench: bench again"):
        VariantTable.load(tmp_path)


@pytest.mark.parametrize("changed", ["torch", "nncf"])
def test_what_another_version_of_a_tool_has_made_is_made_again(tmp_path, monkeypatch, changed):
    "The exporter and the quantiser of OpenVINO: neither is a library that the compiled variant needs."
    from workbench.optimization import compress, variants

    if reason := backends["openvino"].available():
        pytest.skip(reason)
    asked = ASKED | {"backends": ["openvino"], "compressions": ["int8_weights"], "rounds": 1}
    folder = tmp_path / "variants" / "openvino+int8_weights" / "variant.json"
    made = []
    for version in (None, None, "of tomorrow"):
        for module in (compress, variants) if version else ():
            usual = module.installed
            monkeypatch.setattr(module, "installed", lambda name, usual=usual: "of tomorrow" if name == changed else usual(name))
        bench(sasrec(), histories(), tmp_path, **asked)
        made.append(folder.stat().st_mtime_ns)
    assert made[0] == made[1] != made[2]


def test_each_row_says_what_it_is_for(tmp_path):
    table = bench(sasrec(), histories(), tmp_path, backends=["eager", "executorch", "tensorrt"], compressions=["none"], k=K, rounds=1,
                  progress=False)
    found = {row["variant"]: row["target"] for row in table.rows}
    assert {"reference": "cpu", "eager": "cpu", "executorch": "edge", "tensorrt": "gpu"}.items() <= found.items()
    assert ("reference on cuda" in found) == torch.cuda.is_available()
    edge = next(row for row in table.rows if row["variant"] == "executorch")
    assert 0 < edge["planned"] < edge["size"] and "planned memory" in str(table.table().rows[1].keys())


@pytest.mark.gpu
def test_variants_for_a_gpu_stand_beside_the_model_on_the_gpu(tmp_path):
    table = bench(sasrec(), histories(), tmp_path, backends=["tensorrt"], compressions=["none"], k=K, rounds=2, progress=False)
    first, second = table.rows[:2]
    assert (first["variant"], first["target"], second["variant"], second["target"]) == ("reference", "cpu", "reference on cuda", "gpu")
    assert table.facts["measured_gpu"]["peak"]["float32"] > table.facts["measured"]["peak"]["float32"]
    assert second["gpu_memory"] > 0 and "gpu_memory" not in first
    assert second["status"] == "reference" and second["p50"] > 0 and second["agreement"] > 0.99
    assert table.decide(Gate(ndcg=0.0)).variant != "reference on cuda"


WRONG = {
    "a way": ({"smaller": ["distilled", "typo"]}, UnknownNameError, "smaller model named 'typo'"),
    "a backend": ({"backends": ["eager", "typo"]}, UnknownNameError, "backend named 'typo'"),
    "a compression": ({"compressions": ["none", "typo"]}, UnknownNameError, "compression named 'typo'"),
    "no pair": ({"backends": ["executorch"], "compressions": ["int8_scan"]}, UsageError, "executorch: int8_scan is for onnxruntime"),
    "rounds": ({"rounds": 0}, UsageError, "rounds is 0"),
    "k": ({"k": -1}, UsageError, "k is -1"),
    "no k": ({"k": 0}, UsageError, "k is 0"),
    "threads": ({"threads": 1.5}, UsageError, "threads is 1.5"),
    "batches": ({"batches": (0,)}, UsageError, "a batch is 0"),
    "large batches": ({"batches": (1, 1000)}, UsageError, "a batch of 1000"),
    "minutes": ({"minutes": -1}, UsageError, "minutes is -1"),
    "no number": ({"minutes": float("nan")}, UsageError, "minutes is nan"),
    "cores": ({"pin": True, "threads": 10_000}, UsageError, "10000 threads cannot be kept on"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_bench_that_is_asked_for_wrongly_does_nothing(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        bench(sasrec(), histories(), tmp_path / "b", progress=False, **changes)
    assert list(tmp_path.iterdir()) == [], "nothing was trained, compiled or written"


SPAWNER = """
import subprocess, sys
from workbench.optimization.worker import TASKS, main
def spawn(desk, wait):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
    open("child", "w").write(str(child.pid))
    return {"code": child.wait() if wait else 0}
TASKS["spawn"] = spawn
main()
"""


class Spawner(Worker):
    "A worker whose compiler starts a program of its own."

    module = "spawner"


@pytest.fixture
def spawner(tmp_path, monkeypatch):
    "Where it writes the number of what it has started."
    (tmp_path / "spawner.py").write_text(SPAWNER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "child"


def ends(pid, seconds=20):
    "Whether a process ends soon; one that nobody has waited for has ended."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", ["closed", "too slow", "gone before"])
def test_what_a_worker_has_started_ends_with_it(spawner, how):
    with Spawner() as worker:
        if how == "too slow":
            with pytest.raises(BackendError, match="longer than the 5 seconds"):
                worker.ask("spawn", timeout=5, wait=True)
        else:
            worker.ask("spawn", wait=False)
            assert not ends(int(spawner.read_text()), 0.2), "it runs"
        if how == "gone before":
            worker.process.kill()
            worker.process.wait()
    assert ends(int(spawner.read_text())) and ends(worker.process.pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_a_busy_worker_and_what_it_has_started_end_with_the_bench(spawner, how):
    code = ("from workbench.optimization.worker import Worker\n"
            "class Spawner(Worker): module = 'spawner'\n"
            "with Spawner() as worker: worker.ask('spawn', wait=True)")
    bench, deadline = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True), time.monotonic() + 30
    while not (spawner.exists() and spawner.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(spawner.read_text())
    worker = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.killpg(bench.pid, how)                                       # as a terminal does: to a group that the worker is not in
    assert bench.wait(20) != 0 and ends(worker) and ends(child)


class Watched(Worker):
    "A worker that notes, when it is closed, which cores each of its threads may use."

    cores: ClassVar[list[set[int]]] = []

    def close(self):
        threads = Path(f"/proc/{self.process.pid}/task")
        for each in threads.glob("*"):
            with suppress(ProcessLookupError):                                # a thread that has just ended
                self.cores.append(os.sched_getaffinity(int(each.name)))
        super().close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that keeps processes on cores")
def test_workers_that_are_pinned_stay_on_the_last_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.optimization.benchmark.Worker", Watched)
    monkeypatch.setattr(Watched, "cores", [])
    mine = os.sched_getaffinity(0)
    table = bench(sasrec(), histories(), tmp_path, **ASKED, rounds=1, pin=True)
    assert [row["status"] for row in table.rows] == ["reference", "ok"]
    assert len(Watched.cores) >= 3 and all(each == {max(mine)} for each in Watched.cores), "of the compiler and both that were measured"
    assert table.facts["pinned"] == [max(mine)] and os.sched_getaffinity(0) == mine


def test_where_nothing_can_be_pinned_it_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(UsageError, match="leave pin out"):
        bench(sasrec(), histories(), tmp_path / "b", **ASKED, pin=True)
    assert list(tmp_path.iterdir()) == []


def test_a_pinned_bench_goes_on_with_pinned_rounds_only(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "b")
    assert kept(bench(sasrec(), histories(), folder, **ASKED, rounds=2, pin=True)) == {(0, 2)}


def test_a_table_says_what_the_machine_can_do_and_measures_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_PATHS_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    try:
        facts = [bench(sasrec(), histories(), tmp_path / "b", **ASKED, rounds=1).facts for _ in range(2)]
        path, = (tmp_path / "home" / "machine").iterdir()
    finally:
        settings.cache_clear()
    assert path.name == f"{facts[0]['key']}-1.json" and json.loads(path.read_text()) == facts[0]["measured"] == facts[1]["measured"]
    assert facts[0]["measured"]["threads"] == 1 and facts[0]["measured"]["peak"]["float32"] > 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The folder of a bench that was killed when at least two rounds had ended."
    here = tmp_path_factory.mktemp("killed")
    save_model(sasrec(), here / "model")
    histories().save(here / "histories")
    code = (f"from workbench.data.histories import Histories; from workbench.models.ranker import load_model;"
            f"from workbench.optimization.benchmark import bench;"
            f"bench(load_model({str(here / 'model')!r}), Histories.load({str(here / 'histories')!r}), {str(here / 'bench')!r},"
            f" **{ASKED!r}, rounds=1000)")
    process, deadline = subprocess.Popen([sys.executable, "-c", code]), time.monotonic() + 300
    while not (here / "bench" / "rounds" / "0001.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return here / "bench"


def kept(table):
    "Rounds kept and rounds in all, of each row."
    return {(row["kept"], row["rounds"]) for row in table.rows}


def test_a_bench_that_was_killed_keeps_its_rounds_and_measures_the_missing_ones(killed, tmp_path):
    rounds = sorted(Path(shutil.copytree(killed, tmp_path / "b") / "rounds").glob("0*.json"))
    first = json.loads(rounds[0].read_text())
    first["figures"][0]["latencies"] = [1e9] * 1_000_000            # of the reference: where it is kept, it shows
    rounds[0].write_text(json.dumps(first))
    table = bench(sasrec(), histories(), tmp_path / "b", **ASKED, rounds=len(rounds) + 1)
    assert kept(table) == {(len(rounds), len(rounds) + 1)}
    assert table.rows[0]["p50"] == 1e9 > table.rows[1]["p50"]
    assert not (tmp_path / "b" / "rounds").exists(), "it has ended: the next one measures anew"


@pytest.mark.parametrize("change", ["other cases", "compiled again", "incomplete"])
def test_rounds_that_were_measured_otherwise_do_not_count(killed, tmp_path, change):
    folder, data = shutil.copytree(killed, tmp_path / "b"), histories()
    if change == "other cases":
        data = histories(events=17)
    elif change == "compiled again":
        (folder / "variants" / "eager" / "variant.json").unlink()
    else:
        file = folder / "rounds" / "0001.json"
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"figures": record["figures"][:1]}))
    assert kept(bench(sasrec(), data, folder, **ASKED, rounds=2)) == {(int(change == "incomplete"), 2)}


def test_the_interval_of_a_share_holds_the_true_one_as_often_as_it_says():
    draw, held = np.random.default_rng(0), []
    places = draw.integers(1, 60, 200_000)
    later = places + draw.integers(0, 3, len(places)) * (draw.random(len(places)) < 0.2)          # what a lossy variant does
    gained = [np.where(each <= 10, 1 / np.log2(1 + each), 0.0) for each in (later, places)]
    true = gained[0].mean() / gained[1].mean()
    for _ in range(300):
        ours, parents = (each[rows] for rows in [draw.integers(0, len(places), 900)] for each in gained)
        found = kept_share(ours, parents)
        assert found.low <= found.value <= found.high
        held.append(found.low <= true <= found.high)
    assert 0.90 < np.mean(held) < 0.99, "19 of 20 are said"


def test_the_rewrite_of_a_large_catalogue_stays_sparse(tmp_path):
    lists = Neighbours(n_items=6_000, width=4, length=3).eval()
    lists.neighbours.copy_(torch.randint(1, 6_001, (6_001, 4)))
    lists.weights.copy_(torch.rand(6_001, 4))
    assert compile_variant(lists, tmp_path / "v", "onnxruntime", k=K).size < 2_000_000


def test_every_registered_model_can_be_the_parent_of_a_variant():
    "A model that is added later must export, so it is listed here or this fails."
    listed = {"popularity", "neighbours", "blend", "sasrec", "esasrec", "hstu", "two_tower"}   # networks: test_models.py
    assert listed == {name for name in known_models() if not name.startswith("test")}
