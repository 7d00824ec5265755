"""Measurements can be believed: another library gets the same numbers, luck is called luck, and nothing leaks."""
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from workbench.data.batches import WindowBatches
from workbench.data.histories import Histories, cut_by_time, pack
from workbench.data.interactions import read_interactions
from workbench.errors import EvaluationError
from workbench.evaluation.compare import compare, compare_all
from workbench.evaluation.metrics import NAMES, estimate, measure
from workbench.evaluation.protocol import Report, evaluate, place, ranks
from workbench.models.baselines import fit_item_knn, fit_markov, fit_popularity
from workbench.training.fit import fit
from workbench.training.recipes import sasrec

DAY = 1_577_923_200  # 2020-01-02 in unix seconds
ITEMS = 40


def random_log(seed: int = 0, users: int = 80, name: str = "random") -> Histories:
    "Histories of 3 to 14 items in a shuffled log; many targets stand in their own history."
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 15, users)
    who, when = np.repeat(np.arange(users), lengths), np.concatenate([rng.permutation(n) for n in lengths])
    order = rng.permutation(len(who))
    return pack(name, who[order], rng.integers(0, ITEMS, len(who)), DAY + when[order], np.arange(users).astype(str),
                np.arange(ITEMS).astype(str), exclude_seen=False)


class Given:
    "A model that hands out prepared scores, case after case."

    length = 50

    def __init__(self, scores: np.ndarray):
        self.scores, self.row = torch.as_tensor(scores, dtype=torch.float32), 0

    def __call__(self, items, lengths):
        self.row += len(items)
        return self.scores[self.row - len(items):self.row]


def random_scores(split, kind: str, seed: int = 1) -> np.ndarray:
    "Scores for every case: with many ties, or with none."
    rng, shape = np.random.default_rng(seed), (len(split), ITEMS + 1)
    if kind == "ties":
        return rng.integers(0, 6, shape).astype(float)
    return rng.permuted(np.broadcast_to(np.arange(ITEMS + 1.0), shape), axis=1)


def rivals(split, scores: np.ndarray, exclude_seen: bool):
    "Yield for each case its target and the scores of the items that may be recommended, in plain Python."
    for case, target in enumerate(split.targets.tolist()):
        seen = set(split.items[split.starts[case]:split.ends[case]].tolist()) if exclude_seen else set()
        yield target, {item: float(scores[case, item]) for item in range(1, ITEMS + 1) if item not in seen}


@pytest.fixture(scope="module")
def log() -> Histories:
    return random_log()


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("kind", ["ties", "distinct"])
def test_ranks_are_those_of_a_plain_count(log, kind, exclude_seen):
    scores = random_scores(log.test, kind)
    expected = [sum(score >= left[target] for score in left.values()) if target in left else ITEMS + 1
                for target, left in rivals(log.test, scores, exclude_seen)]
    for size in (None, 1, 7):
        assert ranks(Given(scores), log.test, exclude_seen, batch_size=size).ranks.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("kind", ["ties", "distinct"])
def test_every_metric_is_what_ranx_says(log, kind, exclude_seen):
    from ranx import Qrels, Run
    from ranx import evaluate as ranx_evaluate

    def theirs(favour: float) -> dict[str, np.ndarray]:
        "Let ranx judge, with a tie broken against the target or in its favour."
        wanted, found = {}, {}
        for case, (target, left) in enumerate(rivals(log.test, scores, exclude_seen)):
            wanted[str(case)] = {str(target): 1}
            found[str(case)] = {str(item): score + favour * (item == target) for item, score in left.items()}
        run = Run(found)
        ranx_evaluate(Qrels(wanted), run, list(NAMES))
        return {name: np.array([run.scores[name][case] for case in wanted]) for name in NAMES}

    scores = random_scores(log.test, kind)
    report, against, favoured = evaluate(Given(scores), log.test, exclude_seen=exclude_seen), theirs(-0.5), theirs(0.5)
    assert (ITEMS + 1 in report.ranks) is exclude_seen, "some targets were seen, and ranx is never told of them"
    for name in NAMES:
        np.testing.assert_allclose(measure(name, report.ranks), against[name], atol=1e-12, err_msg=name)
        assert report[name] == pytest.approx(against[name].mean(), abs=1e-12)
        better = bool(favoured[name].mean() > report[name])
        assert better is (kind == "ties"), "the control: the comparison sees on whose side a tie is"


@pytest.mark.parametrize("value", [0.0, 1e30, -3.5])
def test_a_model_that_prefers_nothing_is_ranked_last_and_never_first(log, value):
    constant = np.full((len(log.test), ITEMS + 1), value)
    kept, left = (ranks(Given(constant), log.test, exclude_seen).ranks for exclude_seen in (False, True))
    assert (kept == ITEMS).all() and left.min() > 20
    assert set(evaluate(Given(constant), log.test).values.values()) <= {0.0, 10 / ITEMS}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_with_its_case(log, value):
    scores = random_scores(log.test, "distinct")
    scores[[11, 30], [4, 7]] = value
    for size in (None, 5):
        with pytest.raises(EvaluationError, match=r"test case 11 \(user row 11\) are not all finite: the model"):
            evaluate(Given(scores), log.test, batch_size=size)


def test_without_its_check_nan_would_be_the_best_model_of_all():
    "The negative control: nothing is greater than or equal to NaN, so a NaN target has rank 0."
    found = place(torch.full((3, 6), torch.nan), torch.tensor([1, 2, 3]), torch.zeros(3, 1, dtype=torch.long))
    assert found.tolist() == [0, 0, 0] and measure("hit_rate@1", found.numpy()).mean() == 1


def test_the_score_of_the_padding_does_not_matter(log):
    scores = random_scores(log.test, "distinct")
    plain = ranks(Given(scores), log.test).ranks
    scores[:, 0] = np.nan
    assert (ranks(Given(scores), log.test).ranks == plain).all()


@pytest.mark.parametrize("shape", [
    lambda s: s[:, 1:], lambda s: np.pad(s, ((0, 0), (0, 1))), lambda s: s[:, 0], lambda s: s.T, lambda s: s[:, None],
    lambda s: s[:-1]])
def test_scores_of_a_wrong_shape_are_a_named_error(log, shape):
    with pytest.raises(EvaluationError, match=rf"scores of shape \(.*\) instead of \(80, {ITEMS + 1}\)"):
        evaluate(Given(shape(random_scores(log.test, "distinct"))), log.test)


def test_no_cases_and_empty_histories_are_named_errors_never_a_metric_of_zero(log):
    with pytest.raises(EvaluationError, match="the validation part has no cases: there is nothing to measure"):
        evaluate(Given(np.zeros((0, ITEMS + 1))), log.validation.select(np.arange(0)))
    bare = replace(log.test, starts=log.test.ends)
    with pytest.raises(EvaluationError, match="a test case has an empty history"):
        evaluate(Given(random_scores(bare, "distinct")), bare)


def test_an_evaluation_changes_neither_the_scores_nor_the_mode_of_a_model(log):
    model = fit_popularity(log.train).train()
    before = model.scores.clone()
    evaluate(model, log.test, exclude_seen=True)
    assert torch.equal(model.scores, before) and model.training


def samples(draws: int, cases: int) -> np.ndarray:
    "Draw samples of a skewed distribution with the mean 1."
    return np.random.default_rng(5).exponential(size=(draws, cases))


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_an_interval_holds_the_truth_as_often_as_it_says(confidence):
    found = [estimate(sample, confidence, repeats=400) for sample in samples(draws=400, cases=250)]
    held = np.mean([each.low <= 1 <= each.high for each in found])
    half = np.mean([abs(each.value - 1) <= (each.high - each.low) / 4 for each in found])
    assert abs(held - confidence) < 0.08
    assert half < confidence - 0.08, "the control: intervals of half the width are found out"


def test_an_interval_narrows_with_the_root_of_the_number_of_cases():
    few, many = (estimate(samples(1, cases)[0], repeats=1000) for cases in (400, 6400))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.2)
    assert few.low < few.value < few.high and estimate(np.ones(9)).low == estimate(np.ones(9)).high == 1


@pytest.fixture(scope="module")
def large() -> Histories:
    return random_log(seed=3, users=500)


def skilled(log: Histories, skill: float, seed: int, name: str = "", **options) -> Report:
    "Measure a model that finds the target the more often, the more skill it has."
    scores = np.random.default_rng(seed).normal(size=(len(log.test), ITEMS + 1))
    scores[np.arange(len(log.test)), log.test.targets] += skill
    return evaluate(Given(scores), log.test, name=name or f"skill {skill}", repeats=300, **options)


def test_a_model_is_level_with_itself_and_with_its_noisy_twins(large):
    same = [skilled(large, 1.0, seed) for seed in range(21)]
    assert compare(same[0], same[0]).level and compare(same[0], same[0]).p_value == 1
    verdicts = [compare(same[0], other, repeats=1000).verdict for other in same[1:]]
    assert verdicts.count("level") >= 17          # one in twenty may be a false alarm
    assert not compare_all(same[0], dict(enumerate(same)), repeats=1000).worse


def test_a_clearly_better_model_is_called_better_and_the_other_worse(large):
    weak, strong = skilled(large, 0.5, 1, "weak"), skilled(large, 1.5, 2, "strong")
    won, lost = compare(strong, weak), compare(weak, strong)
    assert won.better and lost.worse and won.p_value == lost.p_value < 0.001 and won.low > 0 > lost.high
    assert str(won).startswith("strong is better than weak: ndcg@10")


def test_the_test_is_paired_a_small_steady_gain_is_seen_where_two_intervals_overlap(large):
    before = skilled(large, 1.0, 1)
    after = replace(before, model="after", ranks=np.maximum(before.ranks - 1, 1))
    mean = {name: estimate(measure("ndcg@10", report.ranks)) for name, report in (("before", before), ("after", after))}
    assert mean["after"].low < mean["before"].high and compare(after, before).better
    shuffled = replace(after, ranks=np.random.default_rng(0).permutation(after.ranks))
    assert compare(shuffled, before).p_value > 10 * compare(after, before).p_value, "the control: pairing sees it"


def test_reports_of_other_cases_are_refused_although_their_arrays_would_subtract(log):
    report, other = skilled(log, 1.0, 1), skilled(random_log(seed=9), 1.0, 1)
    turned = evaluate(Given(random_scores(log.test, "distinct")), log.test.select(np.arange(80)[::-1]))
    validation = evaluate(Given(random_scores(log.test, "distinct")), log.validation)
    for stranger in (other, turned, validation):
        assert report.ranks.shape == stranger.ranks.shape, "the control: by the shapes alone nobody would notice"
        with pytest.raises(EvaluationError, match="were measured on different cases: evaluate both on the same split"):
            compare(report, stranger)
    with pytest.raises(EvaluationError, match="kept was measured with seen items kept and left with seen items left"):
        compare(skilled(log, 1.0, 1, "left", exclude_seen=True), skilled(log, 1.0, 1, "kept", exclude_seen=False))


def test_a_saved_report_comes_back_and_can_be_compared(log, tmp_path):
    report = skilled(log, 1.0, 1, "kept")
    again = Report.load(report.save(tmp_path / "report"))
    assert again.to_dict() == report.to_dict() and (again.ranks == report.ranks).all()
    assert compare(again, report).p_value == 1


def flip(data: bytes) -> bytes:
    "Change one bit of the last number."
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("ranks.npy", flip, "ranks.npy was changed"), ("ranks.npy", lambda data: data[:-9], "ranks.npy was changed"),
    ("ranks.npy", None, "No such file"), ("report.json", None, "does not exist"),
    ("report.json", lambda data: data[:-9], "not valid JSON"),
    ("report.json", lambda data: data.replace(b'"sha256"', b'"sha"'), "sha256")])
def test_a_damaged_report_is_refused(log, tmp_path, name, damage, message):
    path = skilled(log, 1.0, 1).save(tmp_path / "report") / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(EvaluationError, match=rf"report is not a complete report \(.*{message}.*\): evaluate again"):
        Report.load(tmp_path / "report")


def test_the_checksum_and_the_metrics_are_what_refuse_changed_ranks(log, tmp_path, monkeypatch):
    "The negative control: numpy reads the changed file without a word; with both guards off it passes."
    from workbench.evaluation import protocol
    from workbench.files import sha256

    report = skilled(log, 1.0, 1)
    path = report.save(tmp_path / "report") / "ranks.npy"
    path.write_bytes(flip(path.read_bytes()))
    assert (np.load(path) != report.ranks).sum() == 1
    facts = json.loads(path.with_name("report.json").read_text())
    path.with_name("report.json").write_text(json.dumps(facts | {"sha256": sha256(path)}))
    with pytest.raises(EvaluationError, match="was changed"):
        Report.load(path.parent)
    monkeypatch.setattr(protocol.np, "isclose", lambda *values: True)
    assert (Report.load(path.parent).ranks != report.ranks).sum() == 1


USERS, EACH = 25, 8
SPLITS = {"leave_last_out": "leave_last_out", "by time": (DAY + 400, DAY + 600)}


def dirty_log(folder):
    "A log in no order, in which each user's newest rows claim to be of 1970 or of the far future."
    good = [(f"u{u}", f"u{u} at {step}", DAY + 100 * step + u) for u in range(USERS) for step in range(EACH)]
    claims = {"in 1970": 7, "in 2100": 4_102_444_800}
    bad = [(f"u{u}", f"u{u} {claim}", time) for u in range(USERS) for claim, time in claims.items()]
    table = pl.DataFrame(good + bad, schema=["user_id", "item_id", "timestamp"], orient="row")
    table.sample(fraction=1, shuffle=True, seed=2).write_csv(folder / "log.csv")
    return folder / "log.csv"


def names(log: Histories, indices) -> set[str]:
    "Return the items of an array of indices, padding left out."
    return set(log.decode(np.unique(indices[indices > 0])))


@pytest.mark.parametrize("split", SPLITS)
def test_no_target_is_ever_trained_on_however_dirty_the_times_are(tmp_path, split):
    log = read_interactions(dirty_log(tmp_path), home=tmp_path, limit=0.5).histories(split=SPLITS[split])
    batches = WindowBatches(log.train, length=3, batch_size=4)
    trained = names(log, np.concatenate([part.numpy().ravel() for batch in batches for part in batch[:2]]))
    first, last = {"leave_last_out": (EACH - 2, EACH - 1), "by time": (4, 6)}[split]
    assert names(log, log.validation.targets) == {f"u{u} at {first}" for u in range(USERS)}
    assert names(log, log.test.targets) == {f"u{u} at {last}" for u in range(USERS)}
    assert trained == {f"u{u} at {step}" for u in range(USERS) for step in range(first)}
    assert not [item for item in log.item_ids if " in " in item], "rows of 1970 and 2100 are in nobody's history"


def test_unsorted_times_would_leak_if_they_were_not_sorted_first():
    "The negative control: the same cut on the rows as they came trains on what happened after it."
    times = np.array([DAY + 900, DAY, DAY + 100, DAY + 500, DAY + 700])
    moments, ids = (DAY + 400, DAY + 600), np.arange(5).astype(str)
    train, _, _ = cut_by_time(np.array([0, 5]), times, moments)
    assert times[:train[0]].max() >= moments[0]
    packed = pack("one", np.zeros(5, int), np.arange(5), times, np.array(["a"]), ids, moments)
    assert packed.timestamps[:packed.train_ends[0]].tolist() == [DAY, DAY + 100]


class Spy(Given):
    "Remembers what it was asked about."

    def __call__(self, items, lengths):
        for row, items_of_one in enumerate(items, self.row):
            self.asked[row] = items_of_one[items_of_one > 0].tolist()
        return super().__call__(items, lengths)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_model_is_never_shown_the_target_or_anything_after_it(tmp_path, part):
    log = read_interactions(dirty_log(tmp_path), home=tmp_path, limit=0.5).histories()
    split, cut = getattr(log, part), EACH - {"validation": 2, "test": 1}[part]
    spy = Spy(np.zeros((USERS, log.n_items + 1)))
    spy.asked = {}
    evaluate(spy, split, log.train, batch_size=4)
    assert [log.decode(spy.asked[row]) for row in range(USERS)] == [
        [f"{log.user_ids[user]} at {step}" for step in range(cut)] for user in split.users]


def with_other_targets(log: Histories, *parts: str) -> Histories:
    "Return a log in which other items were played where some targets stand."
    items = log.items.copy()
    for part in parts:
        ends = getattr(log, part).ends
        items[ends] = items[ends] % ITEMS + 1
    return replace(log, items=items)


def learned(model) -> torch.Tensor:
    "Return all that a model has learned, as one row."
    return torch.cat([part.detach().flatten().double() for part in model.state_dict().values()])


@pytest.mark.parametrize("fit_model", [fit_popularity, fit_item_knn, fit_markov])
def test_a_baseline_learns_nothing_from_the_targets(log, fit_model):
    other = with_other_targets(log, "validation", "test")
    assert torch.equal(learned(fit_model(log.train)), learned(fit_model(other.train)))
    leaked, other_leaked = (learned(fit_model(each.test)) for each in (log, other))
    assert not torch.equal(leaked, other_leaked), "the control: a leak would show"


def test_a_network_learns_nothing_from_the_test_targets_not_even_when_to_stop(log):
    recipe = sasrec("tiny", length=10, epochs=2, check_every=1, batch_size=32, warmup=2)
    weights = [learned(fit(recipe, each, progress=False).model) for each in (log, with_other_targets(log, "test"))]
    assert torch.equal(*weights)
