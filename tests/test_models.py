"""Models: packed rows are as good as rows, last month's file still loads, every model compiles, a cold item is found."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from workbench.data.batches import WindowBatches
from workbench.data.datasets import load
from workbench.data.histories import pack
from workbench.data.vocabulary import frequent_tags, tag_features, with_items
from workbench.evaluation.protocol import ranks
from workbench.models.baselines import fit_popularity, item_counts
from workbench.models.blocks import UNKNOWN
from workbench.models.growing import grow
from workbench.models.ranker import known_models, load_model
from workbench.optimization.backends import backends
from workbench.optimization.export import TopK, example_inputs
from workbench.optimization.rewrite import serving_form
from workbench.optimization.variants import compile_variant
from workbench.training.fit import fit
from workbench.training.recipes import sasrec

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = ["sasrec", "esasrec", "hstu"]
ALL = [*BLOCKS, "two_tower"]
N_ITEMS, LENGTH = 150, 24


def build(name, features=None, dropout=0.0, **changes):
    "A model with weights as large as trained ones."
    torch.manual_seed(0)
    model = known_models()[name](n_items=N_ITEMS, length=LENGTH, width=16, blocks=2, heads=2, dropout=dropout,
                                 features=features, **changes)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.1 * torch.randn_like(weights)
        model.items.weight[0] = 0
    return model.eval()


def packed_rows(rows=6, seed=0):
    "Rows filled with histories of one to nine items, the last places left empty."
    draw = np.random.default_rng(seed)
    segments = np.zeros((rows, LENGTH), dtype=np.int64)
    for row in segments:
        sizes = draw.integers(1, 10, LENGTH)
        row[:] = np.repeat(np.arange(1, LENGTH + 1), sizes)[:LENGTH]
        row[LENGTH - draw.integers(1, 5):] = 0
    items = np.where(segments > 0, draw.integers(1, N_ITEMS + 1, segments.shape), 0)
    times = draw.integers(0, 10**6, segments.shape).cumsum(1) * (segments > 0)
    return (torch.from_numpy(each) for each in (items, segments, times))


def alone(model, items, segments, times):
    "Encode every history in a row of its own and put the results where they stood."
    found = torch.zeros(*items.shape, 16)
    for row, (own, numbers) in enumerate(zip(items, segments, strict=True)):
        for number in numbers.unique()[numbers.unique() > 0]:
            places = (numbers == number).nonzero()[:, 0]
            there = None if times is None else times[row, places][None]
            found[row, places] = model.hidden(own[places][None], times=there)[0]
    return found


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_histories_that_share_a_row_come_out_as_if_each_had_its_own(name, timed):
    model, (items, segments, times) = build(name), packed_rows()
    times = times if timed else None
    packed, real = model.hidden(items, segments, times), segments > 0
    torch.testing.assert_close(packed[real], alone(model, items, segments, times)[real], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(packed).all(), "padding must not become NaN: its gradient would spoil everything"
    assert not torch.allclose(packed[real], model.hidden(items, times=times)[real], atol=1e-2), "without segments they mix"


@pytest.mark.parametrize("name", ALL)
def test_packing_changes_no_gradient(name):
    model, (items, segments, _) = build(name), packed_rows()
    real = segments > 0

    def gradients(hidden):
        model.zero_grad()
        hidden[real].square().mean().backward()
        return {key: weights.grad.clone() for key, weights in model.named_parameters() if weights.grad is not None}

    packed, apart = gradients(model.hidden(items, segments)), gradients(alone(model, items, segments, None))
    assert packed.keys() == apart.keys()
    for key in packed:
        torch.testing.assert_close(packed[key], apart[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ALL)
def test_packed_training_in_bfloat16_stays_close_and_finite(name):
    model, (items, segments, times) = build(name, dropout=0.2), packed_rows()
    exact = model.hidden(items, segments, times)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.hidden(items, segments, times)
        model.train().hidden(items, segments, times).float().square().mean().backward()
    assert F.cosine_similarity(exact, rough.float(), dim=2).min() > 0.99
    assert all(torch.isfinite(weights.grad).all() for weights in model.parameters() if weights.grad is not None)


@pytest.mark.parametrize("name", ["sasrec", "esasrec"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_fused_and_a_mask_is_made_at_most_once(name, packed):
    model, (items, segments, _) = build(name), packed_rows()
    with torch.profiler.profile() as profile:
        model.train().hidden(items, segments if packed else None)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2       # blocks
    assert calls.get("aten::masked_fill_", 0) == packed
    assert "aten::_scaled_dot_product_attention_math" not in calls


def test_times_are_forgotten_in_training_only():
    model, (items, _, times) = build("hstu"), packed_rows()
    known, unknown = model.hidden(items, times=times), model.hidden(items)
    torch.testing.assert_close(model.hidden(items, times=torch.full_like(times, UNKNOWN)), unknown)
    torch.testing.assert_close(model.hidden(items, times=times), known, msg="evaluation must not draw")
    model.untimed = 1.0
    torch.testing.assert_close(model.train().hidden(items, times=times), unknown)
    assert not torch.allclose(known, unknown)


KEYS = ["blocks.0.attention.key_value.bias", "blocks.0.attention.key_value.weight", "blocks.0.attention.out.bias",
        "blocks.0.attention.out.weight", "blocks.0.attention.query.bias", "blocks.0.attention.query.weight",
        "blocks.0.feed_forward.0.bias", "blocks.0.feed_forward.0.weight", "blocks.0.feed_forward.2.bias",
        "blocks.0.feed_forward.2.weight", "blocks.0.norm_attention.bias", "blocks.0.norm_attention.weight",
        "blocks.0.norm_feed_forward.bias", "blocks.0.norm_feed_forward.weight"]
SHAPES = [(8,), (8, 4), (4,), (4, 4), (4,), (4, 4), (16,), (16, 4), (4,), (4, 16), (4,), (4,), (4,), (4,)]


def test_a_model_saved_before_there_was_a_family_loads_and_scores_the_same(tmp_path):
    "Names, shapes and scores were taken from the version that knew one class only (a7fd0e0)."
    shapes = {key.replace("0", layer, 1): shape for layer in "01" for key, shape in zip(KEYS, SHAPES, strict=True)}
    shapes |= {"items.weight": (10, 4), "norm.bias": (4,), "norm.weight": (4,), "positions.weight": (4, 4)}
    state = {name: torch.sin(torch.arange(np.prod(shapes[name]), dtype=torch.float64) * 1.7 + k).reshape(shapes[name]) / 2
             for k, name in enumerate(sorted(shapes))}
    save_file({name: weights.float() for name, weights in state.items()}, tmp_path / "weights.safetensors")
    config = {"n_items": 9, "length": 4, "width": 4, "blocks": 2, "heads": 2, "dropout": 0.2}
    (tmp_path / "model.json").write_text(json.dumps({"name": "sasrec", "config": config}))
    model = load_model(tmp_path)
    assert model.config() == config | {"expansion": 4, "hidden": 0, "head_width": 0}
    scores = model(torch.tensor([[3, 1, 9, 0], [2, 2, 7, 4]]), torch.tensor([3, 4]))[:, 1:]
    np.testing.assert_allclose(scores.detach(), [
        [.65599060, .74805069, .64471620, .37297854, .00381708, -.36634144, -.64080977, -.74789536, -.65962690],
        [.52752977, .57584798, .47375098, .24790779, -.04269019, -.32213724, -.51744041, -.57758558, -.48686251]], atol=1e-5)


def features(columns=6):
    return torch.rand(N_ITEMS + 1, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow), "onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["esasrec", "hstu", "two_tower"])
def test_every_model_compiles_for_every_backend_and_any_batch(tmp_path, name, backend):
    if reason := backends[backend].available():
        pytest.skip(reason)
    model = build(name, features())
    answer = compile_variant(model, tmp_path / "v", backend, k=10).callable()
    for batch, excluded in ((1, 1), (33, 60)):
        inputs = example_inputs(LENGTH, N_ITEMS, batch, excluded, seed=batch)
        with torch.inference_mode():
            ids, scores = TopK(model, 10)(*inputs)
        found = answer(*(x.numpy() for x in inputs))
        np.testing.assert_allclose(found[1], scores, rtol=1e-4, atol=1e-3)
        assert (found[0] == ids.numpy()).mean() > 0.99                            # equal scores may change places


@pytest.mark.parametrize("name", ["esasrec", "hstu", "two_tower"])
def test_the_scan_of_every_model_can_be_quantised(tmp_path, name):
    variant = compile_variant(build(name, features()), tmp_path / "v", "onnxruntime", "int8_scan", k=10)
    assert variant.name == "onnxruntime+int8_scan"


@pytest.mark.parametrize("name", ALL)
def test_what_is_served_does_not_compute_item_vectors(name):
    served = serving_form(build(name, features()))
    assert served.items.columns == 0 and served.item_vectors() is served.items.weight


# Cold items: a tenth of the films is taken out of every history before training.

WIDTH, COLD_LENGTH = 32, 30


def without(histories, cold):
    "The same histories as if some items had never existed; cold: bool [n_items + 1]."
    users, kept = np.repeat(np.arange(histories.n_users), np.diff(histories.offsets)), ~cold[histories.items]
    warm = np.flatnonzero(~cold[1:])
    rows = np.searchsorted(warm, histories.items[kept] - 1)
    return pack("warm", users[kept], rows, histories.timestamps[kept], histories.user_ids, histories.item_ids[warm],
                exclude_seen=True)


def cold_cases(histories, cold):
    "Each play of a cold item, with the warm items before it: int64 [m, length], int64 [m], int64 [m]."
    found = []
    for start, end in zip(histories.offsets, histories.offsets[1:], strict=False):
        items = np.asarray(histories.items[start:end])
        for place in np.flatnonzero(cold[items]):
            before = items[:place][~cold[items[:place]]][-COLD_LENGTH:]
            if len(before) >= 3:
                found.append((np.pad(before, (0, COLD_LENGTH - len(before))), len(before), items[place]))
    rows, lengths, targets = zip(*found, strict=True)
    return np.array(rows, dtype=np.int64), np.array(lengths), np.array(targets, dtype=np.int64)


@pytest.fixture(scope="module")
def cold():
    "Histories without the cold films, the vocabulary with them at its end, features, and the cases."
    log = load("movielens-100k")
    whole = log.histories(min_count=5)
    taken = np.zeros(whole.n_items + 1, dtype=bool)
    taken[1 + np.random.default_rng(0).choice(whole.n_items, whole.n_items // 10, replace=False)] = True
    warm = without(whole, taken)
    wide = with_items(warm, whole.item_ids)
    rows, lengths, targets = cold_cases(whole, taken)
    index = np.append(0, wide.encode(whole.item_ids))
    tags = frequent_tags(log.catalogue)
    known, new = (torch.from_numpy(tag_features(log.catalogue, h.item_ids, tags)) for h in (warm, wide))
    return warm, wide, known, new, (torch.from_numpy(index[rows]), torch.from_numpy(lengths), index[targets])


def train(model, split, epochs=3):
    "Full cross entropy, a few epochs, no frills."
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    batches = WindowBatches(split, length=COLD_LENGTH, batch_size=64, seed=0)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            items, targets = batch[0][0], batch[1][0]
            hidden, real = model.hidden(items), targets > 0
            optimizer.zero_grad()
            F.cross_entropy(hidden[real] @ model.item_vectors()[1:].T, targets[real] - 1).backward()
            optimizer.step()
    return model.eval()


def placed(model, cases, first):
    "Mean share of the other cold items placed before a target, averaged by item, and the width of its 99% bound."
    items, lengths, targets = cases
    with torch.inference_mode():
        parts = zip(items.split(512), lengths.split(512), strict=True)
        scores = torch.cat([model(*part)[:, first:] for part in parts])
    own = scores.gather(1, torch.from_numpy(targets - first)[:, None])
    share = ((scores > own).sum(1) / (scores.shape[1] - 1)).numpy()
    means = np.array([share[targets == item].mean() for item in np.unique(targets)])
    return means.mean(), 2.33 * means.std(ddof=1) / np.sqrt(len(means))


def small(name, n_items, **changes):
    torch.manual_seed(0)
    return known_models()[name](n_items=n_items, length=COLD_LENGTH, width=WIDTH, blocks=1, heads=1, dropout=0.1, **changes)


@pytest.mark.parametrize("name", ["sasrec", "two_tower"])
def test_a_cold_item_is_placed_by_its_features_better_than_chance(cold, name):
    "Among cold items only, where chance is a half exactly: over the whole catalogue a guess about popularity would help."
    warm, wide, known, new, cases = cold
    trained = train(small(name, warm.n_items, features=known, id_dropout=0.3), warm.train)
    mean, bound = placed(grow(trained, warm.item_ids.tolist(), wide.item_ids.tolist(), new), cases, warm.n_items + 1)
    assert mean + bound < 0.5


def test_without_features_a_cold_item_is_placed_by_chance(cold):
    "The negative control of the test above: the same items, cases and measure."
    warm, wide, _, _, cases = cold
    trained = train(small("sasrec", warm.n_items), warm.train)
    mean, bound = placed(grow(trained, warm.item_ids.tolist(), wide.item_ids.tolist()), cases, warm.n_items + 1)
    assert mean - bound < 0.5 < mean + bound


def test_an_item_of_the_vocabulary_that_nobody_plays_is_ranked_by_its_features_alone(cold):
    "Here cold items are in the catalogue while it trains, and every softmax says that they are not the answer."
    warm, wide, _, new, cases = cold
    model = small("sasrec", wide.n_items, features=new, id_dropout=0.3)
    model.items.know(torch.from_numpy(item_counts(wide.train)) > 0)
    before = model.items.weight[warm.n_items + 1:].clone()
    mean, bound = placed(train(model, wide.train), cases, warm.n_items + 1)
    assert mean + bound < 0.5
    torch.testing.assert_close(model.item_vectors()[-1], model.items.projection(new[-1]))
    assert torch.allclose(model.items.weight[warm.n_items + 1:], before, atol=1e-2), "their rows learn nothing"


def test_a_grown_model_goes_on_learning(cold):
    warm, wide, known, new, _ = cold
    trained = train(small("sasrec", warm.n_items, features=known), warm.train, epochs=1)
    grown = grow(trained, warm.item_ids.tolist(), wide.item_ids.tolist(), new)
    items, lengths = torch.randint(1, warm.n_items + 1, (5, COLD_LENGTH)), torch.tensor([30, 3, 9, 1, 12])
    torch.testing.assert_close(grown(items, lengths)[:, :warm.n_items + 1], trained(items, lengths))
    before = grown(items, lengths)
    assert not torch.allclose(train(grown, wide.train, epochs=1)(items, lengths), before, atol=0.1)


@pytest.mark.slow
def test_two_towers_retrieve_more_than_popularity():
    histories = load("movielens-100k").histories(min_count=5)
    recipe = sasrec("tiny", model="two_tower", heads=4, epochs=4, check_every=4, learning_rate=5e-3, warmup=20)
    model = fit(recipe, histories, progress=False).model
    recall = {kind: (ranks(each, histories.test).ranks <= 100).mean()
              for kind, each in {"towers": model, "popular": fit_popularity(histories.train)}.items()}
    assert recall["towers"] > recall["popular"] + 0.15
