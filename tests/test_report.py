"""The page of a run: complete when the run is, useful when it failed, and harmless whatever the data are called."""
import io
import json
import re
import shutil
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from workbench.evaluation.compare import compare_all
from workbench.evaluation.metrics import NAMES, estimate, measure
from workbench.evaluation.protocol import Report, Slice
from workbench.files import write_json
from workbench.operations.report import write_report
from workbench.operations.summary import Summary

HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>"
STEPS = ("prepare", "train", "evaluate", "optimize", "package", "report")
SECTIONS = ("steps", "data", "models", "tests", "slices", "training", "variants", "champion", "where", "versions")
KINDS = {"popularity": {}, "item_knn": {"length": 50}, "sasrec": {"model": "sasrec", "length": 50},
         "sasrec+item_knn": {"members": ["sasrec", "item_knn"], "weights": [0.25, 0.75], "scale": "zscore"}}


class Page(HTMLParser):
    "What a browser would make of a page: its elements with their attributes, and its text."

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]


def make_report(name: str, best: int) -> Report:
    "A report of sixty cases, whose ranks begin at `best`."
    ranks = best + np.arange(60) % 20
    metrics = {metric: estimate(measure(metric, ranks), repeats=50) for metric in NAMES}
    facts = {"cases": 60, "coverage": 0.5, **{name: metrics[f"{name}@10"] for name in ("ndcg", "hit_rate", "mrr")}}
    slices = (Slice(by="history length", name="1–9 items", **facts), Slice(by="popularity", name="head", **facts))
    return Report(model=name, split="test", cases="c0ffee", ranks=ranks, metrics=metrics, coverage=0.5, slices=slices,
                  n_items=99, exclude_seen=True, repeat_share=0.0, confidence=0.95)


def make_reports(winner: str) -> dict[str, Report]:
    return {name: make_report(name, 1 if name == winner else 4) for name in KINDS}


def make_facts(winner: str) -> dict[str, dict]:
    "What the steps of a night say."
    validation = {name: 0.1 + 0.01 * number + (name == winner) for number, name in enumerate(KINDS)}
    reports = make_reports(winner)
    comparisons = compare_all(reports[winner], reports, repeats=200).to_dict()
    same = {"agreement": 1.0, "ndcg": 0.2, "ndcg_share": 1.0}
    rows = [{"variant": "reference", "backend": "eager", "status": "reference", "p50": 480.0, "p99": 900.0, "ratio": 1.0, **same},
            {"variant": "onnxruntime", "backend": "onnxruntime", "status": "ok", "p50": 148.0, "p99": 310.0, "ratio": 0.31, "size": 11.0, **same},
            {"variant": "inductor", "status": "failed", "reason": f"no compiler {HOSTILE}"}]
    machine = {"processor": "a processor", "cores": 2, "threads": 1, "versions": {"torch": "2.13"}}
    return {
        "prepare": {"data": {"name": HOSTILE, "dropped": [{"reason": "user_id is missing", "rows": 7}]},
                    "histories": {"users": 60, "items": 99, "interactions": 4321, "test_cases": 60,
                                  "rule": "leave_last_out", "exclude_seen": True, "repeat_share": 0.0}},
        "train": {"candidates": [{"name": name, "ndcg@10": validation[name], "settings": settings, "tried": 9}
                                 for name, settings in KINDS.items()],
                  "best": winner, "recipe": {"name": "sasrec-small"}, "metrics": {"ndcg@10": 0.12, "epochs": 2},
                  "curve": [{"epoch": 1, "loss": 7.4}, {"epoch": 2, "loss": 6.9, "ndcg@10": 0.12}]},
        "evaluate": {"winner": winner, "validation": validation, "comparisons": comparisons,
                     "reports": {name: report.to_dict() for name, report in reports.items()}},
        "optimize": {"variant": "onnxruntime", "reason": "the fastest", "table": {"facts": machine, "rows": rows}},
        "package": {"name": "ranking-films", "version": 3, "model": winner, "bundle": "bundle",
                    "proof": {"questions": 28, "median_milliseconds": 4.9},
                    "decision": {"promoted": True, "previous": 2, "reason": "0.1195 against 0.1181 of version 2",
                                 "comparison": comparisons["comparisons"][0] | {"a_value": 0.1195, "b_value": 0.1181}}}}


def make_record(home: Path, until: str = "report", status: str = "running", **ending) -> dict:
    "The record of a night that came to `until`."
    steps, folder = [], home / "runs" / "20261125-155330-0aa2"
    for name in STEPS:
        step = {"name": name, "status": "waiting", "seconds": None, "parameters": {"seed": 0}}
        if STEPS.index(name) < STEPS.index(until):
            step |= {"status": "succeeded", "folder": str(home / "steps" / name / "1a"), "seconds": 9.5}
        steps.append(step | ({"status": status} | ending if name == until else {}))
    return {"run_id": folder.name, "pipeline": "nightly", "folder": str(folder), "status": status, "seconds": 71.0,
            "started": datetime.now(UTC).isoformat(), "steps": steps}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "What a night leaves behind."
    folder = tmp_path_factory.mktemp("home")
    for name, facts in make_facts("item_knn").items():
        write_json(folder / "steps" / name / "1a" / "step.json", {"facts": facts})
    for name, report in make_reports("item_knn").items():
        report.save(folder / "steps" / "evaluate" / "1a" / "reports" / name)
    return folder


@pytest.fixture(scope="module")
def written(home) -> Path:
    "The page of a night in which all went well."
    return write_report(Summary.of(make_record(home)), home / "report.html", "Last night")


@pytest.fixture
def whole(written) -> str:
    return written.read_text()


def test_a_complete_run_has_every_section(whole):
    page = Page(whole)
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == list(SECTIONS)
    assert page.values("href")[1:] == [f"#{name}" for name in SECTIONS]
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
    assert all(attrs.get("aria-label") for tag, attrs in page.elements if tag == "svg")
    for text in ("0.1181", "p50 [µs]", "sasrec-small", "4,321", "7 × user_id is missing", "seed = 0", "torch 2.13"):
        assert text in page.text
    assert len(whole) < 200_000


def test_the_step_that_writes_the_page_is_not_a_problem(home, whole):
    summary = Summary.of(make_record(home))
    assert summary.status == "succeeded" and summary.sentences()[0].startswith("Pipeline nightly succeeded in ")
    assert 'class="alert"' not in whole and "it is writing this" in whole
    under_way = Summary.of(make_record(home, "optimize")).sentences()
    assert under_way[0].startswith("Pipeline nightly has been running for ")


@pytest.mark.parametrize("step", ["prepare", "train", "evaluate", "package"])
def test_a_failed_run_names_step_cell_and_error(home, tmp_path, step):
    ending = {"cell": 4, "source": "table = bench(model)", "error": "it is <broken>"}
    summary = Summary.of(make_record(home, step, "failed", **ending, notebook=str(tmp_path / "broken.ipynb")))
    page = Page(write_report(summary, tmp_path / "report.html").read_text())
    sections = page.values("id")
    assert f"Step {step} failed in cell 4 (table = bench(model)): it is <broken>." in page.text
    assert "failed" in sections and str(tmp_path / "broken.ipynb") in page.text and "Did not run: " in page.text
    assert [*summary.facts] == list(STEPS[:STEPS.index(step)]) and ("data" in sections) == (step != "prepare")
    assert ("models" in sections) == (step not in ("prepare", "train"))
    assert ("variants" in sections) == (step == "package") and json.dumps(summary.to_dict())


def test_a_killed_run_is_told_apart_from_a_failed_one(home, tmp_path):
    summary = Summary.of(make_record(home, "train", "killed"))
    text = Page(write_report(summary, tmp_path / "report.html").read_text()).text
    assert "Pipeline nightly was interrupted." in text and "Step train was interrupted." in text
    assert "failed after" not in text


def test_text_from_data_and_errors_never_becomes_markup(home, whole, tmp_path):
    ending = {"cell": 2, "source": HOSTILE, "error": HOSTILE, "parameters": {"x": HOSTILE}}
    summary = Summary.of(make_record(home, "train", "failed", **ending))
    failed = write_report(summary, tmp_path / "report.html", HOSTILE).read_text()
    for page in map(Page, (whole, failed, summary._repr_html_(), Summary.of(make_record(home))._repr_html_())):
        assert HOSTILE in page.text and not {"script", "img"} & {tag for tag, _ in page.elements}
        assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_the_page_loads_nothing(whole):
    page = Page(whole)
    found = [value for name in ("src", "href", "xlink:href", "srcset", "data", "action") for value in page.values(name)]
    assert found and all(value.startswith("#") or value == "data:," for value in found)
    assert "@import" not in whole and set(re.findall(r"url\((.)", whole)) <= {"#"} and "http:" not in whole
    policy = next(attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none';") and "script" not in policy


BASELINE = "The winner is a baseline, not a network: sasrec has 0.1200 on validation."


@pytest.mark.parametrize("winner, said", [("item_knn", [BASELINE]), ("popularity", [BASELINE]), ("sasrec", []),
                                          ("sasrec+item_knn", ["The winner is a blend: 25% sasrec and 75% item_knn."])])
def test_a_winner_that_is_no_network_is_called_what_it_is(home, winner, said):
    sentences = Summary(make_record(home), make_facts(winner)).sentences()
    assert [sentence for sentence in sentences if sentence.startswith("The winner is ")] == said
    assert any(sentence.startswith(f"{winner} won on validation (NDCG@10 1.1") for sentence in sentences)
    assert any(sentence.startswith("In the paired test it is better than ") for sentence in sentences)


def test_reports_that_are_gone_cost_their_plots_and_nothing_else(tmp_path):
    summary = Summary(make_record(tmp_path), make_facts("item_knn"))
    page = Page(write_report(summary, tmp_path / "report.html").read_text())
    assert {"models", "tests", "variants"} <= set(page.values("id"))
    assert sum(tag == "svg" for tag, _ in page.elements) == 2


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_it_in_its_width(home, width):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(Summary.of(make_record(home)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for figure in ("leave_last_out", "sasrec+item_knn", "onnxruntime", "0.31", "148", "better"):
        assert figure in text


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
def test_a_phone_scrolls_one_way_only_and_complains_of_nothing(written, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
                     f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        screen = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get(written.as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert driver.execute_script("return document.querySelector('td.bar span').offsetHeight") > 0
        assert driver.get_log("browser") == []
    finally:
        driver.quit()
