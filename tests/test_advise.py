"""Advice: counts come from the model, what is asked about can still be trained, machines and costs keep apart what differs."""
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from workbench.data.histories import pack
from workbench.errors import BackendError, UsageError
from workbench.models.baselines import Blend, Neighbours, Popularity
from workbench.models.ranker import known_models
from workbench.models.sequential import HSTU, SASRec
from workbench.models.two_tower import TwoTower
from workbench.optimization.advise import advise, sections, techniques
from workbench.optimization.benchmark import bench
from workbench.optimization.choose import Gate, regressions
from workbench.optimization.cost import cheapest, costs
from workbench.optimization.machine import Fingerprint, side_by_side, this_machine
from workbench.settings import Prices
from workbench.training.recipes import recipes
from workbench.training.roofline import Roofline, measure_roofline

SLOW = Roofline("a slow core", 1, {"float32": 8.0, "bfloat16": 8.0, "int8": 30.0}, {2**18: 20.0, 2**29: 4.0}, 1.0)


def sasrec(**shape):
    torch.manual_seed(0)
    return SASRec(**{"n_items": 120, "length": 12, "width": 16, "blocks": 2, "heads": 2} | shape)


def ask(model, **options):
    return advise(model, "edge", roofline=SLOW, **options)


def python(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_work_is_what_the_shape_of_the_model_says():
    "Two products of 2·L·d·4d in a feed-forward part, one of 2·(n + 1)·d in scoring; a batch multiplies both."
    advice = ask(sasrec())
    work = {row["part"]: row["flops"] for row in advice.parts}
    assert work["scoring"] == 2 * 121 * 16 and work["block 1 feed-forward"] == 2 * (2 * 12 * 16 * 64)
    assert work["block 2 feed-forward"] == 2 * (2 * 16 * 64)
    assert ask(sasrec(), batch=7).total("flops") == 7 * advice.total("flops")
    assert ask(sasrec(), length=24).total("flops") > advice.total("flops")


@pytest.mark.parametrize("name", sorted(recipes))
def test_a_recipe_is_asked_about_before_it_is_trained(name):
    advice = ask(recipes[name]("tiny"), n_items=300)
    assert advice.model.n_items == 300 and advice.seconds > 0 and advice.first


@pytest.mark.parametrize("model", [Popularity(50), Neighbours(50, 5), TwoTower(n_items=50), HSTU(n_items=50),
                                   Blend([SASRec(n_items=50), Neighbours(50, 5)], [1, 1])], ids=lambda m: type(m).__name__)
def test_every_ranker_can_be_asked_about(model):
    assert known_models().name_of(type(model))
    advice = ask(model.eval())
    assert json.loads(json.dumps(advice.to_dict()))["parts"]
    assert all(each.bound >= 0.999 * each.gain for each in advice.techniques)
    screen = io.StringIO()
    Console(file=screen, width=160).print(advice)
    assert "What can be tried" in screen.getvalue() and type(model).__name__ in screen.getvalue()
    assert isinstance(sections(advice)[0], str)


@pytest.fixture(scope="module")
def own():
    return measure_roofline(seconds=0.2)


def test_a_model_is_left_as_it_was(own):
    model = sasrec().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    advice = advise(model, seconds=0.05, roofline=own)
    assert advice.basis == "measured" and advice.techniques
    assert model.training and all(each.requires_grad for each in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    items, lengths = torch.ones(2, 12, dtype=torch.int64), torch.full((2,), 12)
    model(items, lengths).sum().backward()
    assert model.items.weight.grad is not None and "forward" not in vars(model)


def test_the_bound_of_an_int8_scan_grows_with_the_catalogue():
    bounds = [next(each for each in ask(sasrec(n_items=n, width=64)).techniques if each.name.startswith("int8 scan")).bound
              for n in (100, 5_000, 50_000)]
    assert bounds == sorted(bounds) and 1 <= bounds[0] < bounds[2] < 8


def test_beside_the_roofs_of_another_device_nothing_is_timed(own):
    "A file of this machine's own roofs is another device's too: nobody can tell."
    predicted = advise(sasrec(), roofline=SLOW)
    assert predicted.basis == "predicted" and predicted.to_dict()["seconds"] == ask(sasrec()).seconds
    assert not any("was busy" in str(each) for each in sections(predicted))
    read = Roofline(**own.to_dict() | {"bandwidth": own.bandwidth})
    assert advise(sasrec(), roofline=read).basis == "predicted"


@pytest.mark.parametrize(("field", "value"), [
    ("peak", {}), ("peak", {"float32": 0}), ("peak", {"bfloat16": 8.0}), ("peak", {"float32": 8.0, "int8": float("inf")}), ("bandwidth", {}),
    ("bandwidth", {2**20: float("nan")}), ("bandwidth", {0: 4.0}), ("dispatch", -1.0), ("dispatch", float("nan")), ("threads", 0)])
def test_figures_that_no_device_has_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=f"^{field} of a phone is "):
        Roofline(**{"device": "a phone", "threads": 1, "peak": SLOW.peak, "bandwidth": SLOW.bandwidth, "dispatch": 1.0} | {field: value})


def test_threads_are_given_back(own):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        advise(sasrec(), threads=2, seconds=0.05, roofline=own)
        with pytest.raises(BackendError, match="cannot be measured from here"):
            advise(sasrec(), "edge", threads=2)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("sizes", "name", "why"), [({"width": 50}, "half the width", "width=24"),
                                                    ({"width": 15, "heads": 5}, "half the heads", "there is none: a width of 15")])
def test_what_cannot_be_halved_is_less_or_none(sizes, name, why):
    found = {each.name: each for each in techniques(ask(sasrec(**sizes)))}
    assert why in found[name].why and (found[name].gain == 1.0) == why.startswith("there is none")


KEY = "from workbench.optimization.machine import this_machine; here = this_machine(); print(here.key, here.cores)"


def test_a_fingerprint_is_the_same_in_every_process_and_counts_the_cores_it_may_use():
    here = this_machine()
    assert python(KEY).split() == [here.key, f"{here.cores}"]
    if len(os.sched_getaffinity(0)) > 1:
        one = python("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); " + KEY).split()
        assert one[1] == "1" and one[0] != here.key


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    draw = np.random.default_rng(0)
    items = draw.integers(0, 120, 40 * 16)
    items[:120] = np.arange(120)
    log = pack("walks", np.repeat(np.arange(40), 16), items, np.arange(40 * 16), np.arange(40).astype(str),
               np.arange(120).astype(str), exclude_seen=True)
    return bench(sasrec().eval(), log, tmp_path_factory.mktemp("bench"), ["eager", "onnxruntime"], ["none"], k=10, threads=1,
                 minutes=2, rounds=2, progress=False)


def test_a_measured_table_has_costs_in_its_own_currency(table):
    found = costs(table.rows, Prices(currency="CHF", core_hour=0.1, utilisation=1.0), table.facts, Gate(ndcg=0.5))
    by_name = {row["variant"]: row for row in found.rows}
    assert set(by_name) == {"reference", "eager", "onnxruntime"} and found.units["a million, one at a time"] == "CHF"
    measured = next(row for row in table.rows if row["variant"] == "onnxruntime")
    assert by_name["onnxruntime"]["requests a core-second"] == pytest.approx(1e6 / measured["cpu"])
    assert by_name["onnxruntime"]["a million in batches of 8"] == pytest.approx(1e5 / (3600 * measured["throughput_8"]))
    assert cheapest(table, 32, gate=Gate(ndcg=0.5)) in ("eager", "onnxruntime")


@pytest.mark.parametrize(("backend", "target", "hour"), [("tensorrt", "gpu", 2.5), ("executorch", "edge", 0.2), ("onnxruntime", "cpu", 0.3)])
def test_hardware_is_priced_as_what_it_is_whether_or_not_the_row_says_it(table, backend, target, hour):
    prices = Prices(core_hour=0.1, gpu_hour=2.5, edge_hour=0.2, utilisation=1.0)
    measured = next(row for row in table.rows if row["variant"] == "onnxruntime")
    old = {name: value for name, value in measured.items() if name != "target"} | {"backend": backend}
    for row in (old, old | {"target": target}, measured | {"target": target}):
        found = costs([row], prices, table.facts | {"threads": 3}, Gate(ndcg=0.5))
        assert found.rows[0]["target"] == target and (found.rows[0]["requests a core-second"] is None) == (target != "cpu")
        assert found.rows[0]["a million, one at a time"] == pytest.approx(hour * 1e6 / (3600 * measured["throughput_1"]))
        assert [f"{price:g} EUR a" in found.title for price in (2.5, 0.2, 0.1)] == [target == each for each in ("gpu", "edge", "cpu")]


STEADY = {f"against{figure}{end}": 1.0 for figure in ("", "_p99", "_throughput_1", "_throughput_32") for end in ("", "_low", "_high")}


@pytest.mark.parametrize(("figure", "said"), [("throughput_1", "in batches of 1 "), ("throughput_32", "in batches of 32 "),
                                              ("p99", "the champion's p99"), ("memory", "the champion's memory"), ("ndcg", "has an NDCG@10 of")])
def test_what_is_worse_than_the_champion_is_named(table, figure, said):
    "The champion is the row itself but for one figure; its rounds are steady, or say nothing."
    row = next(row for row in table.rows if row["variant"] == "onnxruntime") | STEADY | {"ndcg": 0.4, "rounds": 6, "cases": 2000}
    champion = row | {"variant": "champion", "status": "rival"}
    def found(low):
        paired = f"against_{figure}" in row
        ours = {f"against_{figure}": 3.0, f"against_{figure}_low": low} if paired else {}
        return regressions([row | ours, champion if paired else champion | {figure: row[figure] * (1.2 if figure == "ndcg" else 1 / 3)}],
                           "onnxruntime")
    assert regressions([row, champion], "onnxruntime") == []
    worse = found(2.0)
    assert len(worse) == 1 and worse[0].startswith("onnxruntime ") and said in worse[0]
    assert len(found(0.9)) == (figure in ("memory", "ndcg"))


def test_a_difference_in_ndcg_that_may_be_chance_is_no_regression(table):
    row = next(row for row in table.rows if row["variant"] == "onnxruntime") | {
        "ndcg": 0.10, "rounds": 6} | STEADY
    champion = row | {"variant": "champion", "status": "rival", "ndcg": 0.12}
    def found(ours, theirs): return len(regressions([row | {"cases": ours}, champion | {"cases": theirs}], "onnxruntime"))
    assert [found(cases, cases) for cases in (40, 2000, 20_000)] == [0, 1, 1]
    assert found(40, 2000) == found(2000, 40) == 0   # what few have shown


def test_a_price_comes_from_the_environment(table):
    code = "from workbench.settings import settings; print(settings().prices.currency, settings().prices.core_hour)"
    assert python(code, WORKBENCH_PRICES_CURRENCY="JPY", WORKBENCH_PRICES_CORE_HOUR="6.5") == "JPY 6.5"


def test_machines_do_not_share_a_column(table):
    class Elsewhere:
        facts, rows = table.facts | {"processor": "another one"}, table.rows

    both = side_by_side([table, Elsewhere])
    machines = [str(Fingerprint.from_dict(each.facts)) for each in (table, Elsewhere)]
    assert len(set(machines)) == 2 and set(machines) <= set(both.columns)
    with pytest.raises(BackendError, match="two results say"):
        side_by_side([table, table])
