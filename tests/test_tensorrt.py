"""TensorRT: options that nobody ignores, engines that belong to one machine, and the library's real compiler on the processor.

The parts that need Torch-TensorRT run in an environment of its own: make tensorrt. The parts marked `gpu` have to be run on a GPU.
"""
import ast
import json
import subprocess
import sys
import textwrap
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorrt_host import on_the_host

from workbench.errors import BackendError
from workbench.models.sequential import HSTU, ESASRec, SASRec
from workbench.optimization.backends import backends, installed
from workbench.optimization.compress import known_compressions
from workbench.optimization.export import TopK, example_inputs, export_program
from workbench.optimization.rewrite import serving_form
from workbench.optimization.tensorrt import (
    FILE,
    RECORD,
    TWINS,
    TensorRT,
    TensorRTX,
    answering,
    compile_program,
    dry_run,
    left_in_torch,
    operator_name,
    places,
    read_record,
    refit,
    traced_again,
    why_not,
    write_record,
)
from workbench.optimization.tensorrt_options import EngineOptions, compiler_keywords, engine_options, machine, structure

ROOT = Path(__file__).resolve().parents[1]
LENGTH, ITEMS, K = 50, 3_706, 10
SHARES = {"none": 1.0, "float16": 0.97, "bfloat16": 0.8, "fp8": 0.85}    # of the parent's top 10, on random weights, whose scores lie close

needs_library = pytest.mark.skipif(find_spec("torch_tensorrt") is None, reason="torch_tensorrt is not installed: run make tensorrt")
needs_modelopt = pytest.mark.skipif(find_spec("modelopt") is None, reason="modelopt is not installed: run make tensorrt, or install it beside torch")
precisions = pytest.mark.parametrize("name", ["none", "float16", "bfloat16", pytest.param("fp8", marks=needs_modelopt)])
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="holds where there is no GPU")


def sasrec(seed=0, heads=2, width=64, items=ITEMS, length=LENGTH):
    torch.manual_seed(seed)
    return SASRec(n_items=items, length=length, width=width, blocks=2, heads=heads).eval()


@pytest.fixture(scope="module")
def model():
    return sasrec()


def two_of_four(model):
    "Sets the two smaller of each four weights along a row to zero, in the linear layers: what `Sparsify` keeps while it trains."
    with torch.no_grad():
        for layer in (each for each in model.modules() if isinstance(each, torch.nn.Linear)):
            fours = layer.weight.unflatten(1, (-1, 4))
            layer.weight.mul_(torch.zeros_like(fours).scatter_(2, fours.abs().topk(2).indices, 1).flatten(1))
    return model


@pytest.fixture(scope="module")
def program(model):
    return export_program(model, K)


def compressed(model, name):
    "The program that a registered compression makes of a model, calibrated on drawn histories."
    shown = [tuple(each.numpy() for each in example_inputs(model.length, model.n_items, 64, seed=seed)) for seed in (101, 102)]
    return known_compressions()[name].program(model, K, "tensorrt-rtx", shown)


@pytest.fixture(scope="module")
def program_in(model):
    "Gives the model's program in a precision; each is made once."
    made = {}

    def find(name):
        if name not in made:
            made[name] = compressed(model, name)
        return made[name]

    return find


@pytest.fixture
def library():
    with on_the_host() as found:
        yield found


def share(ids, exact):
    "The share of the first ten places that hold an item of the parent's first ten."
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(np.asarray(ids), np.asarray(exact), strict=True)]))


# ---- without the library


@pytest.mark.parametrize("raised", ["AssertionError('Torch not compiled with CUDA enabled')", "RuntimeError('no driver')",
                                    "Exception('import error')", "OSError('libcudart.so.13: cannot open shared object file')",
                                    "ImportError('cannot import name')"])
def test_however_the_import_fails_there_is_one_reason(raised, tmp_path):
    (tmp_path / "torch_tensorrt.py").write_text(f"print('talk')\nraise {raised}\n")
    code = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[1])
        from workbench.errors import BackendError
        from workbench.optimization.tensorrt import import_tensorrt
        try: import_tensorrt()
        except BackendError as error: print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    [line] = done.stdout.splitlines()
    assert line.startswith(f"torch_tensorrt cannot be imported ({raised.partition('(')[0]}: ") and "install the extra tensorrt" in line


@no_gpu
@pytest.mark.parametrize("name,distribution", [("tensorrt", "torch-tensorrt"), ("tensorrt-rtx", "torch-tensorrt-rtx")])
def test_a_backend_says_what_to_install(name, distribution):
    reason = backends[name].available()
    assert "\n" not in reason
    if installed(distribution) == "–":
        assert reason.startswith(f"{distribution} is not installed: ") and f"pip install 'workbench[{TWINS[distribution]}]'" in reason
    else:
        assert reason.startswith("there is no NVIDIA GPU with a driver here")
    assert set(backends[name].versions()) == {"torch", distribution, name}


def test_the_twin_that_is_installed_is_named(monkeypatch):
    from workbench.optimization import tensorrt

    monkeypatch.setattr(tensorrt, "installed", lambda name: "2.13.0" if name == "torch-tensorrt-rtx" else "–")
    assert "torch-tensorrt-rtx is installed in its place, use tensorrt-rtx" in why_not("torch-tensorrt")


@no_gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_variant_is_refused_with_the_reason(name, tmp_path):
    from workbench.optimization.variants import compile_variant

    with pytest.raises(BackendError) as refused:
        compile_variant(sasrec(items=30, length=6, width=16), tmp_path / "variant", backend=name)
    assert str(refused.value) == backends[name].available()
    assert not (tmp_path / "variant").exists()


@precisions
def test_precision_is_the_programs_and_the_model_stays_as_it_is(model, program_in, name):
    inputs, before = example_inputs(LENGTH, ITEMS, 6), model.items.weight.detach().clone()
    exact = TopK(model, K)(*inputs)
    traced = traced_again(program_in(name), EngineOptions(batch=(1, 4, 32), excluded=(1, 8, 64)))
    ids, scores = traced.module()(*inputs)
    wanted = {"none": "float32", "fp8": "float16"}.get(name, name)
    assert {str(value.dtype) for value in traced.state_dict.values()} == {f"torch.{wanted}"}
    assert scores.dtype == torch.float32 and share(ids, exact[0]) >= SHARES[name]
    assert torch.equal(scores, exact[1]) == (name == "none")         # a shorter format did compute in it
    assert torch.equal(model.items.weight, before)


def test_the_bench_of_a_gpu_has_every_precision():
    known = known_compressions()
    for backend in TWINS.values():
        assert {name for name, each in known.items() if not each.only or backend in each.only} == set(SHARES)


def test_a_retrained_model_has_the_same_structure_and_no_other_has(program):
    options = EngineOptions(refittable=True)
    first = structure(traced_again(program, options))
    assert structure(traced_again(export_program(sasrec(seed=1), K), options)) == first
    for other in (sasrec(heads=4), sasrec(width=32), sasrec(items=ITEMS - 1), sasrec(length=LENGTH - 1)):
        assert structure(traced_again(export_program(other, K), options)) != first
    assert structure(traced_again(program, EngineOptions(batch=(1, 8, 32)))) != first
    assert structure(traced_again(compressed(sasrec(), "float16"), options)) != first


@pytest.fixture
def folder(program, tmp_path):
    "A folder of the right form, whose engine nobody could load."
    (tmp_path / FILE).write_bytes(b"engine" * 1_000)
    write_record(tmp_path, traced_again(program, EngineOptions()), EngineOptions(), {})
    return tmp_path


@pytest.mark.parametrize("name", sorted(TWINS.values()))
def test_an_engine_that_was_cut_short_or_swapped_is_not_opened(folder, name):
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.write_bytes(b"other!" * 1_000)):
        kept = (folder / FILE).read_bytes()
        damage(folder / FILE)
        with pytest.raises(BackendError, match=r"is damaged: model\.pt2 was changed; compile it again"):
            backends[name].load(folder)
        (folder / FILE).write_bytes(kept)
    (folder / FILE).unlink()
    with pytest.raises(BackendError, match=r"model\.pt2 is missing"):
        backends[name].load(folder)


@pytest.mark.parametrize("field", ["gpu", "driver", "cuda", "torch", "torch-tensorrt-rtx"], ids="the-{}".format)
def test_an_engine_of_another_machine_is_not_opened(folder, field):
    record = json.loads((folder / RECORD).read_text())
    record["machine"][field] = "another"
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(BackendError, match=f"was built elsewhere \\({field} was another and is .*compile it on this machine"):
        TensorRT().load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"options": {}}', '{"files": 3}'])
def test_a_record_that_is_none_is_refused(folder, text):
    (folder / RECORD).write_text(text)
    with pytest.raises(BackendError, match="compile"):
        read_record(folder)


@no_gpu
def test_a_whole_engine_without_a_gpu_is_a_reason(folder):
    with pytest.raises(BackendError) as refused:
        TensorRTX().load(folder)
    assert str(refused.value) == TensorRTX().available()


# ---- with the library, on the processor


@needs_library
def test_every_option_reaches_this_version_of_the_library(library):
    import inspect

    every = EngineOptions(optimisation_level=2, workspace=2**20, in_torch=("torch.ops.aten.topk.default",))
    settings = {each.name for each in fields(library.dynamo.CompilationSettings)}
    named = set(inspect.signature(library.dynamo.compile).parameters) - {"kwargs"}
    assert set(compiler_keywords(every, dryrun=True, engine_cache_dir="x", timing_cache_path="y", sparse_weights=True)) <= settings | named


@needs_library
@pytest.mark.parametrize("name", ["enabled_precisions", "use_explicit_typing", "min_blok_size"])
def test_what_the_library_would_ignore_is_an_error(library, program, name, monkeypatch):
    from workbench.optimization import tensorrt

    traced = traced_again(program, EngineOptions())
    library.dynamo.compile(traced, arg_inputs=tensorrt.input_ranges(library, traced, EngineOptions()), dryrun=True, **{name: 1})
    monkeypatch.setattr(tensorrt, "compiler_keywords", lambda options, **mode: {**compiler_keywords(options, **mode), name: 1})
    with pytest.raises(BackendError, match=f"has no option '{name}' and would ignore it"):
        compile_program(traced, EngineOptions(), dry=True)


@needs_library
def test_the_dry_run_tells_where_each_operator_runs_and_why(library, program):
    table = dry_run(program)
    stays = {row["operator"]: row["reason"] for row in table.rows if row["where"] == "PyTorch"}
    assert stays == {"torch.ops.aten.gather.default": "its converter is for static shapes: assume_dynamic"}
    assert table.title.startswith("2 engines, ") and table.title.endswith(" operators in TensorRT")
    inside = {row["operator"] for row in table.rows if row["where"] == "engine 2"}
    assert {"torch.ops.aten.topk.default", "torch.ops.aten.scatter.value"} <= inside


@needs_library
def test_options_move_operators(library, program):
    def torch_part(**changes):
        return {row["operator"]: row["reason"] for row in dry_run(program, EngineOptions(**changes)).rows if row["where"] == "PyTorch"}

    assert torch_part(assume_dynamic=True) == {}
    assert torch_part(in_torch=("torch.ops.aten.topk.default",))["torch.ops.aten.topk.default"] == "asked for: in_torch"
    short = torch_part(smallest_engine=30)
    assert short["torch.ops.aten.topk.default"] == "around it are fewer than 30 operators"


@needs_library
@precisions
@pytest.mark.parametrize("assume_dynamic", [False, True])
def test_the_lowered_graph_answers_as_the_model(library, model, program_in, name, assume_dynamic):
    options = EngineOptions(assume_dynamic=assume_dynamic)
    lowered, parent = compile_program(traced_again(program_in(name), options), options, dry=True), TopK(model, K)
    for batch, excluded in ((1, 1), (3, 40), (256, 20)):
        inputs = example_inputs(LENGTH, ITEMS, batch, excluded, seed=batch)
        with torch.inference_mode():
            (ids, scores), exact = lowered(*inputs), parent(*inputs)
        least = 0.7 if name == "fp8" and batch < 256 else SHARES[name]      # few histories have few places
        assert share(ids, exact[0]) >= least
        if name == "none":
            torch.testing.assert_close(scores, exact[1])


@needs_library
@needs_modelopt
@pytest.mark.parametrize("kind", [SASRec, ESASRec, HSTU])
def test_the_layers_and_the_scores_are_in_fp8_inside_the_engines(library, kind):
    torch.manual_seed(0)
    other = kind(n_items=500, length=20, width=32, blocks=2, heads=2).eval()
    program = compressed(other, "fp8")
    table = dry_run(program)
    where = {row["where"] for row in table.rows if row["operator"] == "torch.ops.tensorrt.quantize_op.default"}
    assert where == {"engine 1", "engine 2"}
    assert {row["operator"] for row in table.rows if row["where"] == "PyTorch"} == {"torch.ops.aten.gather.default"}
    eighths = [node for node in program.graph.nodes if node.target is torch.ops.tensorrt.quantize_op.default]
    rounded = {node.target for each in eighths for node in each.users}
    parted = {torch.ops.aten.chunk.default} if kind is HSTU else set()      # its last block uses half of a layer's weights
    assert rounded == {torch.ops.aten.linear.default} | parted and {each.args[2:4] for each in eighths} == {(8, 4)}
    [scores] = [node for node in program.graph.nodes if node.target is torch.ops.aten.scatter.value]
    assert scores.args[0].target is torch.ops.aten.linear.default and set(scores.args[0].args) <= set(eighths)


@needs_modelopt
def test_fp8_says_what_it_cannot_do(model, monkeypatch):
    from workbench.optimization.variants import FEWEST

    with pytest.raises(BackendError, match="fp8 has no histories to calibrate with"):
        known_compressions()["fp8"].program(model, K, "tensorrt-rtx", ())
    few = [tuple(each.numpy() for each in example_inputs(LENGTH, ITEMS, FEWEST - 1))]
    with pytest.raises(BackendError, match="fp8 cannot calibrate with 31 histories"):
        known_compressions()["fp8"].program(model, K, "tensorrt-rtx", few)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(BackendError, match=r"compute capability 8\.9 or more and this one has 8\.6: use float16"):
        compressed(model, "fp8")


@pytest.mark.skipif(find_spec("modelopt") is not None, reason="holds where modelopt is not installed")
def test_fp8_without_its_quantiser_is_one_line(model):
    with pytest.raises(BackendError, match=r"^fp8 needs nvidia-modelopt, which cannot be imported .*: install the extra tensorrt"):
        compressed(model, "fp8")


@needs_library
@pytest.mark.parametrize("kind", [ESASRec, HSTU])
def test_the_other_models_are_lowered_too(library, kind):
    torch.manual_seed(0)
    other, options = serving_form(kind(n_items=500, length=20, width=32, blocks=2, heads=2).eval()), EngineOptions()
    traced = traced_again(export_program(other, K), options)
    lowered = compile_program(traced, options, dry=True)
    assert {operator_name(node) for where, node in places(lowered) if where == "PyTorch"} == {"torch.ops.aten.gather.default"}
    for batch in (1, 256):
        inputs = example_inputs(20, 500, batch)
        with torch.inference_mode():
            torch.testing.assert_close(lowered(*inputs)[1], TopK(other, K)(*inputs)[1])


@needs_library
def test_precision_reaches_the_lowered_graph(library, program_in):
    traced = traced_again(program_in("bfloat16"), EngineOptions())
    found = {node.meta["val"].dtype for _, node in places(compile_program(traced, EngineOptions(), dry=True))
             if any(word in str(node.target) for word in ("linear", "matmul", "attention", "embedding"))}
    assert found == {torch.bfloat16}


@needs_library
def test_the_lowered_graph_answers_through_the_wrapper(library, model, program):
    options = EngineOptions(batch=(1, 8, 32), cuda_graphs=True)
    lowered = compile_program(traced_again(program, options), options, dry=True)
    answer = answering(lowered, options, library.runtime)
    inputs = example_inputs(LENGTH, ITEMS, 5)
    ids, scores = answer(*(each.numpy() for each in inputs))
    assert ids.dtype == np.int64 and scores.dtype == np.float32 and np.array_equal(ids, TopK(model, K)(*inputs)[0].numpy())
    assert library.runtime._cudagraphs.get_cudagraphs_mode()
    answering(lowered, EngineOptions(batch=(1, 8, 32)), library.runtime)(*(each.numpy() for each in inputs))
    assert not library.runtime._cudagraphs.get_cudagraphs_mode()
    with pytest.raises(BackendError, match="built for 1 to 32 histories and not for 33"):
        answer(*(each.numpy() for each in example_inputs(LENGTH, ITEMS, 33)))


def told_of_zeros(model, name="none", **changes):
    "Whether the builder was told to look for sparse weights, as each engine's settings have it."
    options = EngineOptions(**changes)
    built = compile_program(traced_again(compressed(model, name), options), options)
    return {part.settings.sparse_weights for _, part in built.named_children() if hasattr(part, "serialized_engine")}


SMALL = {"width": 16, "items": 200, "length": 10}


@needs_library
@precisions
def test_the_builder_is_told_of_zeros_in_each_precision(library, name):
    assert told_of_zeros(two_of_four(sasrec(**SMALL)), name) == {True}


@needs_library
def test_the_builder_is_not_told_of_zeros_that_are_not_there_or_not_wanted(library):
    assert told_of_zeros(sasrec(**SMALL)) == {False}
    assert told_of_zeros(two_of_four(sasrec(**SMALL)), sparse=False) == {False}


def engines(module) -> dict[str, bytes]:
    return {name: bytes(part.serialized_engine) for name, part in module.named_children() if hasattr(part, "serialized_engine")}


@needs_library
@no_gpu
@pytest.mark.slow
@precisions
def test_engines_are_built_ahead_of_time(library, program_in, name):
    traced = traced_again(program_in(name), EngineOptions())
    module = compile_program(traced, EngineOptions())
    built, outside = engines(module), left_in_torch(module)
    assert len(built) == 2 and all(1e6 < len(engine) < 8e6 for engine in built.values())
    module = compile_program(traced, EngineOptions(assume_dynamic=True))
    assert len(engines(module)) == 1 and sum(left_in_torch(module).values()) < sum(outside.values())


@pytest.fixture(scope="module")
def size_of_table():
    "Gives the bytes of the engine that holds the table which is scored with; each is built once."
    wide, made = sasrec(width=256, items=20_000), {}

    def find(name):
        if name not in made:
            traced = traced_again(compressed(wide, name), EngineOptions())
            made[name] = len(engines(compile_program(traced, EngineOptions()))["_run_on_acc_2"])
        return made[name]

    return find


@needs_library
@no_gpu
@pytest.mark.slow
@pytest.mark.parametrize(("smaller", "larger"), [("float16", "none"), pytest.param("fp8", "float16", marks=needs_modelopt)])
def test_a_smaller_precision_makes_smaller_engines(library, size_of_table, smaller, larger):
    assert size_of_table(smaller) < 0.8*size_of_table(larger)


@needs_library
@no_gpu
def test_an_engine_that_cannot_be_built_is_one_line(library, program, capfd):
    "A refittable engine is the one that the builder of TensorRT-RTX 1.5 asks a driver for."
    options = EngineOptions(refittable=True)
    with pytest.raises(BackendError, match=r"^Torch-TensorRT failed \(RuntimeError: .*engine build failed"):
        compile_program(traced_again(program, options), options)


@needs_library
def test_a_program_without_an_engine_is_refused_and_not_run_in_pytorch(library, program, tmp_path):
    "The library hands the program back as it was, and says so in its log alone."
    with pytest.raises(BackendError, match=r"^TensorRT converts too few operators of this program .* in PyTorch: dry_run"):
        TensorRT(EngineOptions(smallest_engine=10_000)).compile(program, tmp_path)
    assert not list(tmp_path.iterdir())


@needs_library
def test_the_library_takes_two_models_for_one_and_our_cache_does_not(library, tmp_path):
    "The hash of the library's engine cache leaves out what operators are called with."
    from torch_tensorrt.dynamo._engine_cache import BaseEngineCache
    from torch_tensorrt.dynamo.partitioning import construct_submodule_inputs

    hashes, structures = set(), set()
    options = EngineOptions(refittable=True, cache=str(tmp_path))
    settings = library.dynamo.CompilationSettings(immutable_weights=False)
    for heads in (2, 4):
        traced = traced_again(export_program(sasrec(heads=heads), K), options)
        lowered = compile_program(traced, options, dry=True)
        first = lowered.get_submodule("_run_on_acc_0")
        hashes.add(BaseEngineCache.get_hash(first, construct_submodule_inputs(first), settings))
        structures.add(structure(traced))
    assert len(hashes) == 1 and len(structures) == 2


@needs_library
@no_gpu
@pytest.mark.parametrize("change", ["driver", "gpu", "torch"], ids="the-{}".format)
def test_a_cache_of_another_machine_is_not_used(library, program, tmp_path, monkeypatch, change):
    from workbench.optimization import tensorrt

    options, seen = EngineOptions(refittable=True, cache=str(tmp_path)), []
    traced = traced_again(program, options)
    monkeypatch.setattr(library.dynamo, "compile", record_folder(seen))
    for where in (machine(), {**machine(), change: "another"}, machine()):
        monkeypatch.setattr(tensorrt, "machine", lambda where=where: where)
        compile_program(traced, options)
    assert seen[0] == seen[2] != seen[1] and all(Path(each).parent == tmp_path for each in seen)
    made_for = next(Path(seen[0]).glob("*.json"))
    made_for.write_text(json.dumps({**json.loads(made_for.read_text()), change: "copied"}))
    with pytest.raises(BackendError, match=f"{change} was copied and is .*: remove it"):
        compile_program(traced, options)


def record_folder(seen):
    "A compiler that only notes which cache it is given, with the real one's parameters."
    import inspect

    import torch_tensorrt

    def compile(*args, **keywords):
        seen.append(keywords["engine_cache_dir"])

    compile.__signature__ = inspect.signature(torch_tensorrt.dynamo.compile)
    return compile


# ---- on a GPU


def backend() -> TensorRT:
    return TensorRT if TensorRT().available() is None else TensorRTX


needs_backend = pytest.mark.skipif(torch.cuda.is_available() and TensorRT().available() is not None and TensorRTX().available() is not None,
                                   reason=f"neither backend is available: {TensorRT().available()}; {TensorRTX().available()}")


@pytest.mark.gpu
@needs_backend
@pytest.mark.parametrize("changes", [{}, {"assume_dynamic": True}, {"cuda_graphs": True}, {"save_format": "aot_inductor"},
                                     {"tf32": True}], ids=str)
def test_a_loaded_engine_answers_as_the_model(model, program, tmp_path, changes):
    engine = backend()(EngineOptions(**changes))
    engine.compile(program, tmp_path)
    answer, parent = engine.load(tmp_path), TopK(model, K)
    for batch, excluded in ((1, 1), (8, 20), (3, 40), (1, 20), (256, 20)):     # the first shape comes again after others
        inputs = example_inputs(LENGTH, ITEMS, batch, excluded, seed=batch)
        with torch.inference_mode():
            exact = parent(*inputs)
        for _ in range(3):                                                       # recorded, replayed
            ids, scores = answer(*(each.numpy() for each in inputs))
        precise = not changes.get("tf32")
        assert share(ids, exact[0]) >= (1.0 if precise else 0.8)
        if precise:
            np.testing.assert_allclose(scores, exact[1].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_backend
@precisions
def test_each_precision_is_a_variant_that_answers_nearly_as_the_model(model, tmp_path, name):
    from workbench.optimization.fp8 import SINCE
    from workbench.optimization.variants import Variant, compile_variant

    if name == "fp8" and torch.cuda.get_device_capability() < SINCE:
        pytest.skip("this GPU does not multiply FP8")
    shown = [tuple(each.numpy() for each in example_inputs(LENGTH, ITEMS, 128, seed=101))]
    compile_variant(model, tmp_path / "variant", backend().name, name, k=K, cases=shown)    # checks parity
    answer, parent = Variant.load(tmp_path / "variant").callable(), TopK(model, K)
    for batch, excluded in ((1, 1), (8, 20), (256, 20), (1, 1)):
        inputs = example_inputs(LENGTH, ITEMS, batch, excluded, seed=batch)
        ids, scores = answer(*(each.numpy() for each in inputs))
        with torch.inference_mode():
            exact = parent(*inputs)
        assert scores.dtype == np.float32 and np.isfinite(scores).all() and (np.diff(scores, axis=1) <= 0).all()
        if batch == 256:
            assert share(ids, exact[0]) >= SHARES[name]


@pytest.mark.gpu
@needs_backend
@pytest.mark.parametrize("name", ["none", "float16"])
def test_a_two_of_four_network_answers_as_its_parent_does(tmp_path, name):
    from workbench.optimization.variants import Variant, compile_variant

    parent = two_of_four(sasrec(width=128))
    compile_variant(parent, tmp_path / "variant", backend().name, name, k=K)    # checks parity
    answer, inputs = Variant.load(tmp_path / "variant").callable(), example_inputs(LENGTH, ITEMS, 256)
    ids, scores = answer(*(each.numpy() for each in inputs))
    with torch.inference_mode():
        exact = TopK(parent, K)(*inputs)
    assert share(ids, exact[0]) >= SHARES[name]
    np.testing.assert_allclose(scores, exact[1].numpy(), rtol=1e-4 if name == "none" else 0.02, atol=1e-4 if name == "none" else 0.02)


@pytest.mark.gpu
@needs_backend
def test_a_variant_has_the_options_of_the_registered_backend(model, tmp_path, monkeypatch):
    from workbench.optimization.backends import known_backends
    from workbench.optimization.variants import Variant, compile_variant

    name = backend().name
    with monkeypatch.context() as changed:
        changed.setattr(known_backends()[name], "options", EngineOptions(cuda_graphs=True, refittable=True, cache=str(tmp_path / "cache")))
        compile_variant(model, tmp_path / "variant", name, k=K)    # checks parity
    options = engine_options(read_record(tmp_path / "variant")["options"])
    assert options.cuda_graphs and options.refittable and any((tmp_path / "cache").iterdir())
    inputs = example_inputs(LENGTH, ITEMS, 8)
    ids, _ = Variant.load(tmp_path / "variant").callable()(*(each.numpy() for each in inputs))
    assert share(ids, TopK(model, K)(*inputs)[0]) == 1.0


@pytest.mark.gpu
@needs_backend
def test_a_refitted_engine_answers_as_the_retrained_model(program, tmp_path):
    engine, retrained = backend()(EngineOptions(refittable=True)), sasrec(seed=1)
    (tmp_path / "first").mkdir()
    engine.compile(program, tmp_path / "first")
    refit(tmp_path / "first", export_program(retrained, K), tmp_path / "second")
    inputs = example_inputs(LENGTH, ITEMS, 8)
    ids, _ = engine.load(tmp_path / "second")(*(each.numpy() for each in inputs))
    with torch.inference_mode():
        assert share(ids, TopK(retrained, K)(*inputs)[0]) == 1.0
        old, _ = engine.load(tmp_path / "first")(*(each.numpy() for each in inputs))
        assert share(old, TopK(sasrec(), K)(*inputs)[0]) == 1.0


@pytest.mark.gpu
@needs_backend
def test_the_cache_gives_an_engine_back_with_new_weights(tmp_path):
    engine = backend()(EngineOptions(refittable=True, cache=str(tmp_path / "cache")))
    inputs = example_inputs(LENGTH, ITEMS, 8)
    for name, each in (("a", sasrec()), ("b", sasrec(seed=1)), ("c", sasrec(heads=4))):
        (tmp_path / name).mkdir()
        engine.compile(export_program(each, K), tmp_path / name)
        ids, _ = engine.load(tmp_path / name)(*(value.numpy() for value in inputs))
        with torch.inference_mode():
            assert share(ids, TopK(each, K)(*inputs)[0]) == 1.0
    assert len(list((tmp_path / "cache").iterdir())) == 2      # one structure twice, another once


def test_options_survive_their_record():
    options = EngineOptions(batch=(1, 2, 3), in_torch=("torch.ops.aten.topk.default",), optimisation_level=0)
    assert engine_options(json.loads(json.dumps(options.to_dict()))) == options


def test_the_module_does_not_import_what_it_compiles_with():
    source = ast.parse((ROOT / "workbench/optimization/tensorrt.py").read_text())
    top = {alias.name for node in source.body if isinstance(node, ast.Import) for alias in node.names}
    assert not top & {"torch", "torch_tensorrt", "tensorrt"}
