"""Compression: every technique answers, says why not, or is refused; what it was shown and where it came from are kept."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.data import synthetic
from workbench.data.catalogue import Catalogue
from workbench.data.datasets import load
from workbench.errors import BackendError, BundleError, TrainingError
from workbench.models.baselines import Popularity
from workbench.models.ranker import load_model, save_model
from workbench.models.sequential import HSTU, ESASRec, SASRec
from workbench.models.two_tower import TwoTower
from workbench.optimization.backends import known_backends
from workbench.optimization.benchmark import Rival, bench, of_targets, plan
from workbench.optimization.choose import Gate, regressions
from workbench.optimization.compress import known_compressions
from workbench.optimization.export import TopK
from workbench.optimization.prune import magnitude_masks, prune, recipe_for, sizes
from workbench.optimization.smaller import Distil, Prune, compress, halved, reductions
from workbench.optimization.variants import Variant, check_parity, compile_variant
from workbench.optimization.worker import draw_cases
from workbench.training.distillation import distil
from workbench.training.fit import fit
from workbench.training.recipes import sasrec

N_ITEMS, LENGTH, K = 300, 12, 10
QUICK = sasrec("tiny", length=LENGTH, width=32, blocks=2, heads=2, epochs=8, learning_rate=5e-3, warmup=10, dropout=0.0)
pytestmark = pytest.mark.usefixtures("one_thread")


def walks(users=400, seed=0):
    "A log whose items come once, as far as the service is concerned."
    return replace(synthetic.walks(users, N_ITEMS, plays=15, seed=seed), exclude_seen=True)


@pytest.fixture(scope="module")
def trained():
    "A network that has learned the walkers' habit, and the log."
    log = walks()
    return fit(QUICK, log, progress=False), log


def pairs():
    "Each compression with each backend it is for, that can be used here."
    return [(backend, name) for name, each in known_compressions().items() if name != "none"
            for backend in each.only if backend != "inductor"]


@pytest.mark.parametrize(("backend", "name"), pairs(), ids=lambda each: each)
def test_each_compression_answers_on_each_of_its_backends(trained, tmp_path, backend, name):
    if reason := known_backends()[backend].available():
        pytest.skip(reason)
    run, log = trained
    shown = draw_cases(log.validation, LENGTH, 128).batches(1)
    variant = compile_variant(run.model, tmp_path / "v", backend, name, k=K, cases=shown)
    asked = draw_cases(log.test, LENGTH, 200)
    inputs = asked.batch(0, 200)
    ids, scores = variant.callable()(*inputs)
    with torch.inference_mode():
        exact = TopK(run.model, K)(*map(torch.from_numpy, inputs))[0].numpy()
    assert variant.name == f"{backend}+{name}" and np.isfinite(scores).all() and (np.diff(scores, axis=1) <= 1e-6).all()
    assert not (ids[:, :, None] == inputs[2][:, None]).any(), "an excluded item came back"
    assert (ids[:, 0] == exact[:, 0]).mean() > 0.8, "the first place is seldom lost"


def test_a_static_quantisation_is_refused_without_real_histories(trained, tmp_path, monkeypatch):
    run, log = trained
    one = [draw_cases(log.validation, LENGTH, 1).batches(1)[0]] * 64
    for cases, message in (((), "no histories to calibrate with"), (one, "64 histories of which 1 differ")):
        with pytest.raises(BackendError, match=message):
            compile_variant(run.model, tmp_path / "v", "onnxruntime", "int8_static", k=K, cases=cases)
    assert not (tmp_path / "v").exists()
    for guard in ("variants.check_calibration", "quantise.check_representative"):               # the guards are what refuses it
        monkeypatch.setattr(f"workbench.optimization.{guard}", lambda *_: None)
    assert compile_variant(run.model, tmp_path / "v", "onnxruntime", "int8_static", k=K, cases=one).compression == "int8_static"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "executorch"])
def test_histories_that_do_not_stand_for_others_are_refused_by_every_static_quantisation(trained, tmp_path, backend):
    "Ordinary ones pass: `test_each_compression_answers_on_each_of_its_backends`, and those of movielens-100k below."
    if reason := known_backends()[backend].available():
        pytest.skip(reason)
    run, log = trained
    cases = draw_cases(log.validation, LENGTH, 128)
    draw = np.random.default_rng(0)
    half, five = (replace(cases, items=np.where(cases.items > 0, draw.choice(some, cases.items.shape), 0))
                  for some in (np.arange(100, 120), np.array([1, 50, 100, 150, 200])))
    for shown, message in ((half.batches(1) + cases.batches(1), r"whose halves differ: .* times as often as by chance, 5 may be; draw them"),
                           (cases.batches(1) + half.batches(1), "whose halves differ"), (five.batches(1), "that name 5 of 300 items: draw them")):
        with pytest.raises(BackendError, match=message):
            compile_variant(run.model, tmp_path / "v", backend, "int8_static", k=K, cases=shown)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "executorch"])
@pytest.mark.parametrize("most", [32, 256])
def test_ordinary_histories_of_the_default_data_set_calibrate(tmp_path, backend, most):
    if reason := known_backends()[backend].available():
        pytest.skip(reason)
    log = load("movielens-100k").histories()
    torch.manual_seed(0)
    model = SASRec(n_items=log.n_items, length=20, width=16, blocks=1).eval()
    known_compressions()["int8_static"].program(model, K, backend, draw_cases(log.validation, 20, most).batches(1))


def test_lossy_variants_still_have_a_floor(trained, tmp_path):
    "int8 of everything may change scores; what has nothing to do with the model is refused all the same."
    run, _ = trained
    variant = compile_variant(run.model, tmp_path / "v", "onnxruntime", "int8_dynamic", k=K)
    torch.manual_seed(1)
    other = SASRec(n_items=N_ITEMS, length=LENGTH, width=32).eval()
    torch.nn.init.normal_(other.items.weight)
    with pytest.raises(BackendError, match="of the parent's top 10 survived"):
        check_parity(variant.callable(), TopK(other, K).eval(), 0.5, same=False)
    answer = variant.callable()
    with pytest.raises(BackendError, match="the best do not come first"):
        check_parity(lambda *x: tuple(each[:, ::-1] for each in answer(*x)), TopK(run.model, K).eval(), 0.5, same=False)


@pytest.mark.parametrize("kind", [SASRec, ESASRec, HSTU], ids=lambda each: each.__name__)
@pytest.mark.parametrize("wanted", [{"width": 20}, {"heads": 1}, {"hidden": 40}, {"blocks": 1}, {"width": 20, "heads": 1, "blocks": 1}],
                         ids=str)
def test_a_pruned_network_is_saved_loaded_exported_and_trained_on(kind, wanted, tmp_path):
    torch.manual_seed(0)
    model = kind(n_items=N_ITEMS, length=LENGTH, width=32, blocks=2, heads=2).eval()
    recipe = replace(recipe_for(model, QUICK), epochs=1)
    if kind is HSTU and "hidden" in wanted:
        with pytest.raises(BackendError, match="no size of a HSTU"):
            prune(model, recipe, walks(), batches=2, **wanted)
        return
    pruned = prune(model, recipe, walks(), batches=2, **wanted)
    assert {dial: sizes(pruned)[dial] for dial in wanted} == wanted
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    again = load_model(save_model(pruned, tmp_path / "m"))
    inputs = (torch.randint(1, N_ITEMS, (3, LENGTH)), torch.full((3,), LENGTH))
    with torch.inference_mode():
        assert torch.equal(again(*inputs), pruned(*inputs))
    compile_variant(pruned, tmp_path / "v", "onnxruntime", k=K)
    assert sizes(fit(recipe_for(pruned, recipe), walks(), progress=False, start=pruned).model) == sizes(pruned)


def test_a_student_with_little_to_learn_from_learns_more_with_a_teacher():
    teacher = fit(replace(QUICK, epochs=25), walks(), progress=False).model
    few, small = walks(users=60, seed=5), replace(QUICK, width=16, blocks=1, epochs=30, teacher=0.9)
    taught, alone = distil(teacher, small, few, progress=False), fit(small, few, progress=False)
    assert taught.metrics["ndcg@10"] > 1.1 * alone.metrics["ndcg@10"]


@pytest.mark.parametrize(("width", "start"), [(16, "as its teacher"), (48, None)], ids=["narrower", "wider"])
def test_a_student_says_whether_it_began_as_its_teacher(trained, tmp_path, width, start):
    run, log = trained
    distil(run.model, replace(QUICK, width=width, epochs=1, teacher=1.0), log, tmp_path, progress=False)
    facts = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/*/facts.json")]
    assert {each["start"] for each in facts} == {start}


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.7, 0.99])
def test_the_smallest_weights_go_as_a_quantile_says(share):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(101, 7), torch.nn.Linear(7, 30))
    with torch.no_grad():
        model[1].weight[:9] = 0.05                                  # ties
    every = torch.cat([each.weight.detach().abs().flatten() for each in model])
    wanted = {f"{place}.weight": each.weight.abs() > every.quantile(share) for place, each in enumerate(model)}
    found = magnitude_masks(model, share)
    assert all(torch.equal(found[name], mask) for name, mask in wanted.items()) and found.keys() == wanted.keys()


def test_a_network_of_17_million_weights_loses_half_of_them():
    layer = torch.nn.Linear(17_000, 1_000, bias=False)
    mask = magnitude_masks(torch.nn.Sequential(layer), 0.5)["0.weight"]
    weights = layer.weight.detach().abs()
    assert abs(float(mask.double().mean()) - 0.5) < 1e-4 and weights[mask].min() > weights[~mask].max()


def test_distillation_that_was_interrupted_goes_on_and_ends_the_same(trained, tmp_path):
    run, log = trained
    small = replace(QUICK, width=16, blocks=1, epochs=3, teacher=0.7, teacher_likeness=0.5)
    whole = distil(run.model, small, log, tmp_path / "a", progress=False)
    distil(run.model, replace(small, minutes=1e-9), log, tmp_path / "b", progress=False)
    with pytest.raises(TrainingError, match=r"recipe\.minutes was"):
        distil(run.model, small, log, tmp_path / "b", progress=False)
    again = distil(run.model, small, log, tmp_path / "a", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_a_chain_keeps_its_lineage_through_variant_and_bundle(trained, tmp_path):
    from workbench.serving.bundle import Bundle
    from workbench.serving.engine import Engine

    run, log = trained
    steps = [Distil(recipe=replace(QUICK, width=16, blocks=1, epochs=6)), Prune(recipe=replace(QUICK, epochs=2), hidden=32), "hnswlib"]
    small = compress(run.model, steps, log, tmp_path / "chain", progress=False)
    variant = small.compile(tmp_path / "v", k=50)
    assert variant.name == "onnxruntime+distilled+pruned+hnswlib"
    records = json.loads((tmp_path / "v" / "variant.json").read_text())["lineage"]
    assert [(each["from"], each["to"]) for each in records] == [(each["from"], each["to"]) for each in small.lineage]
    catalogue = Catalogue(log.item_ids, log.item_ids)
    bundle = Bundle.create(variant, catalogue, log, None, tmp_path / "bundle", name="small", version=1)
    answer = Engine(bundle).recommend(["5", "6", "7"], k=5)
    assert len(answer.items) == 5
    damaged = tmp_path / "bundle" / "variant" / "items" / "graph.data"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(BundleError):
        Bundle.load(tmp_path / "bundle")


def test_a_service_of_an_indexed_variant_loads_no_pytorch(trained, tmp_path):
    import subprocess
    import sys

    run, _ = trained
    compile_variant(run.model, tmp_path / "v", "onnxruntime", "usearch", k=K)
    code = f"""
import sys, numpy as np
from workbench.optimization.variants import Variant
ids, _ = Variant.load({str(tmp_path / 'v')!r}).callable()(np.array([[5] + [0]*{LENGTH - 1}]), np.array([1]), np.zeros((1, 1), np.int64))
print(ids.shape, 'torch' in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == f"(1, {K}) False\n"


def test_the_bench_trains_smaller_models_and_says_which_cannot_be(trained, tmp_path):
    run, log = trained
    small = compress(run.model, [Distil(recipe=replace(QUICK, width=16, blocks=1, epochs=6))], log, progress=False)
    table = bench(run.model, log, tmp_path, backends=["onnxruntime"], compressions=["none"], k=K, rounds=2, progress=False,
                  smaller=[small, "sparse"], minutes=5)
    rows = {row["variant"]: row for row in table.rows}
    assert {"onnxruntime", "onnxruntime+distilled", "onnxruntime+sparse"} <= set(rows)
    assert rows["onnxruntime+distilled"]["size"] < rows["onnxruntime"]["size"]
    assert Variant.load(tmp_path / "variants" / "onnxruntime+distilled").lineage[0]["technique"] == "Distil"
    again = bench(run.model, log, tmp_path, backends=["onnxruntime"], compressions=["none"], k=K, rounds=2, progress=False,
                  smaller=[small, "sparse"], minutes=5)
    assert {row["variant"]: row.get("compile") for row in again.rows} == {name: row.get("compile") for name, row in rows.items()}
    popular = Popularity(N_ITEMS).eval()
    rows = bench(popular, log, tmp_path / "p", backends=["onnxruntime"], compressions=["none"], k=K, rounds=2, progress=False,
                 smaller=["pruned"]).rows
    assert any("has no heads" in (row["reason"] or "") for row in rows)


def test_a_variant_is_released_only_when_it_is_proven(trained, tmp_path):
    run, log = trained
    table = bench(run.model, log, tmp_path / "b", backends=["onnxruntime"], compressions=["none", "int4_weights"], k=K, rounds=2,
                  progress=False)
    coarse = next(row for row in table.rows if row["compression"] == "int4_weights")
    low, share = coarse["ndcg_low"], coarse["ndcg_share"]
    assert low < min(share, 0.995) and coarse["cases"] == table.facts["cases"] == 400 and table.decide().variant == "onnxruntime"
    assert Gate(ndcg=low).refusal(coarse) is None
    between = Gate(ndcg=(low + share) / 2).refusal(coarse)
    assert between.startswith("not proven: NDCG@10 is ") and between.endswith("cases might prove it, if the share stays")


def test_a_slower_variant_is_named_with_its_figure(trained, tmp_path):
    "The champion is a variant of a network of a fifth of the width: ours is slower than that, beyond noise."
    _, log = trained
    torch.manual_seed(0)
    quick = compile_variant(SASRec(n_items=N_ITEMS, length=LENGTH, width=8, blocks=1).eval(), tmp_path / "quick", "onnxruntime", k=K)
    heavy = SASRec(n_items=N_ITEMS, length=LENGTH, width=256, blocks=4).eval()
    rival = Rival("champion", quick.folder, draw_cases(log.test, LENGTH, 200))
    table = bench(heavy, log, tmp_path / "b", backends=["onnxruntime"], compressions=["none"], k=K, rounds=6, progress=False, rival=rival)
    worse = regressions(table.rows, "onnxruntime")
    assert any(each.startswith("onnxruntime answers in") and "times the champion's time" in each for each in worse)


def test_targets_choose_backends():
    assert of_targets(["edge"]) == ["executorch"] and set(of_targets(["gpu"])) == {"tensorrt", "tensorrt-graphs", "tensorrt-rtx"}
    assert all(backend == "executorch" for backend, _ in plan(of_targets(["edge"])))
    with pytest.raises(BackendError, match="no target 'phone'"):
        of_targets(["phone"])


def test_ways_to_a_smaller_model_by_name():
    model = SASRec(n_items=50, length=LENGTH, width=32, blocks=2, heads=2)
    assert set(reductions) == {"distilled", "pruned", "sparse", "two_of_four"}
    assert (halved(model).recipe.width, halved(model).recipe.blocks) == (16, 1)
    for way in reductions.values():
        with pytest.raises(BackendError, match="has no heads"):
            way(TwoTower(n_items=50, length=LENGTH))


def test_the_default_data_set_can_be_distilled():
    log = load("movielens-100k").histories()
    model = SASRec(n_items=log.n_items, length=50).eval()
    assert halved(model).recipe.model == "sasrec" and halved(model).recipe.length == 50
