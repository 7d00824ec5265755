"""The command line: exit codes, one sentence for each mistake, and a reference page that is the program itself."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKBENCH = Path(sys.executable).parent / "workbench"


def workbench(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([WORKBENCH, *words], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=120)


def test_every_option_has_its_line_in_the_reference():
    "docs/cli.md is made of the program: python -m workbench.cli.commands > docs/cli.md"
    from workbench.cli.commands import reference

    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf8") == reference()


MISTAKES = [
    (["rnu"], {}, 2, "No such command 'rnu'"),
    (["run", "nightly", "-p", "datset=x"], {}, 2, "did you mean 'dataset'?"),
    (["run", "nightly", "-p", "train.seed=many"], {}, 2, "seed is 'many', which is not a valid int"),
    (["run", "nightly", "-p", "seed"], {}, 2, "write -p name=value"),
    (["run", "weekly"], {}, 2, "there is no pipeline named 'weekly'"),
    (["show", "20200101-000000-0000"], {}, 1, "there is no run '20200101-000000-0000'"),
    (["data", "fetch", "movielens-100"], {}, 2, "did you mean 'movielens-100k'?"),
    (["data", "check", "nowhere.csv"], {}, 1, "nowhere.csv does not exist"),
    (["profile", "--dataset", "movielens-100"], {}, 2, "did you mean 'movielens-100k'?"),
    (["profile", "--seconds", "61"], {}, 2, "less than or equal to 60"),
    (["profile", "--size", "huge"], {}, 2, "there is no size 'huge'"),
    (["bench", "--data", "movielens-100k"], {}, 2, "goes with --history"),
    (["bench", "--history", "--minutes", "3"], {}, 2, "--minutes cannot be had with --history"),
    (["bench", "--batches", "8,0"], {}, 2, "--batches '8,0' is no list of whole numbers from 1 to 256"),
    (["bench", "--threads", "0"], {}, 2, "greater than or equal to 1"),
    (["bench", "--lengths", ""], {}, 2, "--lengths '' is no list of whole numbers from 1 upwards"),
    (["bench", "--catalogues", "many"], {}, 2, "--catalogues 'many' is no list of whole numbers"),
    (["bench", "--lengths", "50", "--smaller", "pruned"], {}, 2, "--smaller cannot be had with --lengths"),
    (["bench", "minilm-l6", "--catalogues", "100"], {}, 2, "--catalogues cannot be had for minilm-l6, which is a text model"),
    (["advise", "--size", "tiny"], {}, 2, "--size tiny goes with --recipe"),
    (["advise", "somewhere", "--recipe", "sasrec"], {}, 2, "MODEL (somewhere) cannot be had with --recipe sasrec"),
    (["advise", "--roofline", "nowhere.json"], {}, 2, "nowhere.json does not describe a device, as nowhere.json does not exist"),
    (["recommend"], {}, 2, "give either --user ID or --history"),
    (["recommend", "--user", "1"], {}, 1, "nothing has been packaged"),
    (["recommend", "--user", "1", "--bundle", "nowhere"], {}, 1, "is not a bundle"),
    (["bench", "--against", "champion", "--rounds", "2"], {}, 2, "--rounds 2 do not tell a worse figure from noise: give 6"),
    (["bench", "minilm-l6", "--against", "champion"], {}, 2, "--against cannot be had for minilm-l6, which is a text model"),
    (["bench", "--engines", "openvino"], {}, 2, "--engines cannot be had for latest, which is a ranker"),
    (["bench", "nowhere.gguf"], {}, 2, "there is no text model named 'nowhere.gguf'"),
    (["bench", "docs"], {}, 2, "neither a ranker (model.json) nor a text model (config.json)"),
    (["serve", "--port", "70000"], {}, 2, "70000"),
    (["serve", "--host", "0.0.0.0"], {}, 2, "is not a loopback address"),
    (["doctor"], {"WORKBENCH_SERVING_PORT": "many"}, 2, "WORKBENCH_SERVING_PORT is 'many', which is not a valid int"),
    (["doctor"], {"WORKBENCH_SERVING_PROT": "3000"}, 2, "WORKBENCH_SERVING_PROT is not a known setting"),
]


@pytest.mark.parametrize(("words", "environment", "code", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_sentence_and_an_exit_code(tmp_path, words, environment, code, message):
    done = workbench(*words, **{"WORKBENCH_PATHS_HOME": str(tmp_path / "home"), **environment})
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "home").glob("runs/*")), "something was started"


def test_with_json_an_error_is_an_object_and_with_debug_it_has_its_traceback(tmp_path):
    home = {"WORKBENCH_PATHS_HOME": str(tmp_path)}
    told = json.loads(workbench("data", "check", "nowhere.csv", "--json", **home).stderr)
    assert told["code"] == "data" and "nowhere.csv" in told["message"]
    assert "Traceback" in workbench("data", "check", "nowhere.csv", "--debug", **home).stderr


@pytest.mark.parametrize("words", [["status"], ["data", "list"], ["doctor"]], ids=lambda words: words[-1])
def test_reading_commands_speak_to_people_and_to_programs(tmp_path, words):
    home = {"WORKBENCH_PATHS_HOME": str(tmp_path)}
    for_people, for_programs = workbench(*words, **home), workbench(*words, "--json", **home)
    assert for_people.returncode == for_programs.returncode == 0 and for_people.stdout.strip()
    assert isinstance(json.loads(for_programs.stdout), dict)


def test_without_a_bench_the_history_is_one_sentence_and_makes_nothing(tmp_path):
    home = {"WORKBENCH_PATHS_HOME": str(tmp_path / "home")}
    assert workbench("bench", "--history", **home).stdout == "no bench has been kept yet: workbench bench\n"
    assert json.loads(workbench("bench", "--history", "--data", "lastfm", "--json", **home).stdout) == {"data": "lastfm", "benches": []}
    assert not (tmp_path / "home").exists()


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    from workbench.data.datasets import load
    from workbench.models.ranker import save_model
    from workbench.models.sequential import SASRec

    items = load("movielens-100k").histories().n_items
    return save_model(SASRec(n_items=items, length=8, width=8, blocks=1).eval(), tmp_path_factory.mktemp("models") / "net")


QUICK = ("--compressions", "int8_scan", "--rounds", "2", "--json")


def test_other_sizes_are_measured_and_nothing_is_chosen(net, tmp_path):
    sizes = ("--lengths", "6", "--catalogues", "40,60", "--batches", "1,4", "--threads", "2", "--output", str(tmp_path / "grid.svg"))
    done = workbench("bench", str(net), *sizes, *QUICK, WORKBENCH_PATHS_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"40x6", "60x6"} and (tmp_path / "grid.svg").stat().st_size > 5000
    for table in found.values():
        assert (table["facts"]["batches"], table["facts"]["threads"], table["facts"]["length"]) == ([1, 4], 2, 6)
        assert [row["variant"] for row in table["rows"]] == ["reference", "onnxruntime+int8_scan"] and table["rows"][1]["throughput_4"] > 0
    assert not (tmp_path / "home" / "mlflow.db").exists(), "nothing was learned, so nothing is remembered"


def test_a_bench_of_which_nothing_can_be_served_is_kept_and_shown_before_it_fails(tmp_path):
    "An int8 scan needs item vectors, which a popularity list does not have."
    from workbench.data.datasets import load
    from workbench.models.baselines import Popularity
    from workbench.models.ranker import save_model
    from workbench.tracking.runs import open_store, start_run

    home = {"WORKBENCH_PATHS_HOME": str(tmp_path / "home")}
    model = save_model(Popularity(load("movielens-100k").histories().n_items).eval(), tmp_path / "popular")
    done = workbench("bench", str(model), *QUICK, **home)
    told = json.loads(done.stderr.splitlines()[-1])["message"]      # the terms of the data stand before it
    assert done.returncode == 1 and "no variant can be served (onnxruntime+int8_scan: " in told
    found = json.loads(done.stdout)
    assert found["decision"] is None and [row["status"] for row in found["rows"]] == ["reference", "failed"]
    kept = json.loads(workbench("bench", "--history", "--json", **home).stdout)["benches"]
    assert [(row["run"], row["variant"]) for row in kept] == [(found["run"], None)]
    with start_run(open_store(tmp_path / "home"), "train", "bench"):              # as a pipeline does on a log of that name
        pass
    kept = json.loads(workbench("bench", "--history", "--json", **home).stdout)["benches"]
    assert [row["run"] for row in kept] == [found["run"]]


def test_a_device_in_a_file_is_refused_by_field_or_predicted_from(tmp_path):
    phone = {"device": "a phone", "threads": 1, "peak": {"float32": 20.0}, "bandwidth": {"1000000": 10.0}, "dispatch": 2.0}
    ask = ("advise", "--recipe", "sasrec", "--size", "tiny", "--items", "300", "--roofline", str(tmp_path / "phone.json"), "--json")
    (tmp_path / "phone.json").write_text(json.dumps(phone | {"peak": {"float32": 0}}))
    wrong = workbench(*ask)
    assert wrong.returncode == 2 and "does not describe a device, as peak of a phone is {'float32': 0.0}" in json.loads(wrong.stderr)["message"]
    (tmp_path / "phone.json").write_text(json.dumps(phone))
    assert json.loads(workbench(*ask).stdout)["basis"] == "predicted"
