"ExecuTorch and int8 programs: the answers are the model's, what cannot be quantised or loaded is refused with its reason."
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from workbench.data.histories import pack
from workbench.errors import BackendError
from workbench.models.baselines import Blend, fit_item_knn, fit_popularity
from workbench.models.sequential import HSTU, ESASRec, SASRec
from workbench.models.two_tower import TwoTower
from workbench.optimization.backends import backends
from workbench.optimization.executorch import RECORD, ExecuTorch, delegation, footprint
from workbench.optimization.export import MAX_BATCH, TopK, example_inputs, export_program
from workbench.optimization.pt2e import linear_layers, quantise_program
from workbench.optimization.variants import Variant, compile_variant

if reason := ExecuTorch().available():
    pytest.skip(reason, allow_module_level=True)

N_ITEMS, LENGTH, K = 150, 12, 10


def encoder(kind=SASRec, **sizes):
    torch.manual_seed(0)
    model = kind(n_items=N_ITEMS, length=LENGTH, width=16, **sizes).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.shape == (N_ITEMS + 1, 16):
                weights[1:].normal_()
    return model


def train():
    draw = np.random.default_rng(0)
    items = draw.integers(0, N_ITEMS, 640)
    items[:N_ITEMS] = np.arange(N_ITEMS)
    return pack("walks", np.repeat(np.arange(40), 16), items, np.arange(640), np.arange(40).astype(str),
                np.arange(N_ITEMS).astype(str), exclude_seen=True).train


def blend():
    return Blend([fit_popularity(train()), fit_item_knn(train())], [0.3, 0.7])


def expected(model, inputs):
    with torch.inference_mode():
        return [x.numpy() for x in TopK(model, K)(*inputs)]


def histories(batches=8, size=32):
    return [tuple(x.numpy() for x in example_inputs(LENGTH, N_ITEMS, size, 5, seed=i)) for i in range(batches)]


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    return compile_variant(encoder(blocks=1), tmp_path_factory.mktemp("variants") / "sasrec", "executorch", k=K)


@pytest.fixture
def copy(variant, tmp_path):
    shutil.copytree(variant.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_variant_answers_like_the_model_at_any_batch_and_any_number_of_exclusions(variant):
    answer = variant.callable()
    for batch, excluded in ((1, 1), (33, 60), (1, N_ITEMS), (3, 500), (MAX_BATCH, 7), (1, 1)):
        inputs = example_inputs(LENGTH, N_ITEMS, batch, excluded, seed=batch)
        inputs[2][:, 100:] = 0
        ids, scores = answer(*(x.numpy() for x in inputs))
        wanted_ids, wanted_scores = expected(encoder(blocks=1), inputs)
        np.testing.assert_array_equal(ids, wanted_ids)
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)
        assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
        assert not (ids[:, :, None] == inputs[2].numpy()[:, None]).any()


def test_more_columns_than_items_lose_no_exclusion(variant):
    items, lengths, exclude = (x.numpy() for x in example_inputs(LENGTH, N_ITEMS, 2, N_ITEMS))
    exclude[:, :] = np.arange(1, N_ITEMS + 1)
    exclude[0, 4] = exclude[1, 7] = 0
    ids, scores = variant.callable()(items, lengths, np.concatenate([exclude]*4, axis=1))
    assert ids[:, 0].tolist() == [5, 8]
    assert np.isfinite(scores).sum(axis=1).tolist() == [1, 1]


MODELS = {"esasrec": lambda: encoder(ESASRec, blocks=1), "hstu": lambda: encoder(HSTU, blocks=1),
          "two_tower": lambda: encoder(TwoTower), "popularity": lambda: fit_popularity(train()),
          "neighbours": lambda: fit_item_knn(train()), "blend": blend}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_ranker_passes_the_comparison_with_its_parent(name, tmp_path):
    model = MODELS[name]().eval()
    inputs = example_inputs(model.length, N_ITEMS, 9, 30)
    _, scores = compile_variant(model, tmp_path / name, "executorch", k=K).callable()(*(x.numpy() for x in inputs))
    np.testing.assert_allclose(scores, expected(model, inputs)[1], atol=1e-5)


def test_int8_of_a_model_without_layers_is_refused_and_not_the_float_program(tmp_path):
    with pytest.raises(BackendError, match="int8 finds no linear layer to quantise here"):
        compile_variant(fit_popularity(train()).eval(), tmp_path / "v", "executorch", "int8_static", k=K, cases=histories())


def test_threads_that_share_a_variant_get_their_own_answers(variant):
    answer = variant.callable()
    batches = histories(16, 3)
    alone = [answer(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: answer(*batch), batches * 4))
    for i, (ids, scores) in enumerate(together):
        np.testing.assert_array_equal(ids, alone[i % 16][0])
        np.testing.assert_array_equal(scores, alone[i % 16][1])


def test_what_runs_where_is_counted_and_the_plan_stays_small(variant):
    counts = {row["operator"]: row for row in delegation(variant.folder).rows}
    assert counts["linear"]["delegated"] == 5 and counts["linear"]["portable"] == 0
    assert counts["topk"]["portable"] == 1 and counts["topk"]["delegated"] == 0
    row = footprint(variant.folder).rows[0]
    assert 0 < row["planned memory"] < 1000
    assert row["file"] * 1000 == (variant.folder / "model.pte").stat().st_size
    assert row["portable"] == sum(one["portable"] for one in counts.values())


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "flipped late", "missing"])
def test_a_damaged_file_is_refused(copy, damage):
    path = copy / "model.pte"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        at = 5000 if damage == "flipped" else len(whole) - 500
        flipped = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:]
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b""}.get(damage, flipped))
    with pytest.raises(BackendError, match="damaged"):
        Variant.load(copy)
    with pytest.raises(BackendError, match="executorch failed"):
        backends["executorch"].load(copy)


@pytest.mark.parametrize("record", ["{}", "[]", "no json", '{"sha256": 3}'])
def test_a_damaged_record_is_refused(copy, record):
    (copy / RECORD).write_text(record)
    with pytest.raises(BackendError, match="compile it again"):
        backends["executorch"].load(copy)


def test_a_file_of_something_else_is_an_error_and_not_the_end_of_the_process(copy):
    record = json.loads((copy / RECORD).read_text())
    for text in (b"not a program" * 100, (copy / "model.pte").read_bytes()[:4000]):
        (copy / "model.pte").write_bytes(text)
        (copy / RECORD).write_text(json.dumps({**record, "sha256": hashlib.sha256(text).hexdigest()}))
        with pytest.raises(BackendError, match=r"executorch failed \(RuntimeError: Failed to load program"):
            backends["executorch"].load(copy)


def test_the_libraries_say_nothing(variant):
    code = f"""
import numpy as np
from workbench.optimization.executorch import ExecuTorch
from workbench.optimization.variants import Variant
answer = Variant.load({str(variant.folder)!r}).callable()
answer(np.ones((1, {LENGTH}), np.int64), np.full(1, {LENGTH}), np.zeros((1, 1), np.int64))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_int8_program_for_xnnpack_is_smaller_and_ranks_like_its_parent(variant, dynamic, tmp_path):
    model = encoder(blocks=1)
    backends["executorch"].compile(quantise_program(export_program(model, K), histories(), dynamic), tmp_path)
    counts = {row["operator"]: row for row in delegation(tmp_path).rows}
    assert counts["linear"]["portable"] == 0
    assert not any("quantize" in name and row["portable"] for name, row in counts.items())
    assert footprint(tmp_path).rows[0]["file"] < footprint(variant.folder).rows[0]["file"]
    inputs = example_inputs(LENGTH, N_ITEMS, 60, 7, seed=9)
    ids, scores = backends["executorch"].load(tmp_path)(*(x.numpy() for x in inputs))
    wanted_ids, wanted_scores = expected(model, inputs)
    assert (ids[:, :, None] == wanted_ids[:, None]).any(2).mean() > 0.9
    assert 1e-4 < np.abs(scores - wanted_scores).max() < 1


def test_layers_that_are_skipped_stay_as_they_were():
    program = export_program(encoder(blocks=1), K)
    inputs = example_inputs(LENGTH, N_ITEMS, 9, 5)
    def scores(form): return form.module()(*inputs)[1]
    with torch.no_grad():
        whole = quantise_program(program, histories(), skip=linear_layers(program))
        torch.testing.assert_close(scores(whole), scores(program))
        part = quantise_program(program, histories(), skip=["feed_forward"])
        assert not torch.equal(scores(part), scores(program))
        assert not torch.equal(scores(part), scores(quantise_program(program, histories())))


def test_calibration_that_covers_nothing_is_refused_with_the_figure():
    program = export_program(encoder(blocks=1), K)
    with pytest.raises(BackendError, match="no histories to calibrate with"):
        quantise_program(program, [])
    one = tuple(x[:1] for x in histories()[0])
    for few in ([one], [one] * 50, [(np.zeros((4, LENGTH), int), np.ones(4, int), np.zeros((4, 1), int))]):
        with pytest.raises(BackendError, match=r"of which 1 differ"):
            quantise_program(program, few)
    with pytest.raises(BackendError, match="quantisation for xnnpack failed"):
        quantise_program(program, [tuple(x[:, :3] if x.ndim == 2 else x for x in batch) for batch in histories()])
