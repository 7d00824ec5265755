"""Text models: an engine in full precision says what the model says, a smaller one knows nearly as much, and what cannot run is a reason."""
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import BackendError, ModelError, UnknownNameError
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
    text_model_folder,
)

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


def test_four_bits_in_blocks_keep_the_perplexity_and_the_size_of_a_four_bit_file(generator, said, tmp_path):
    skip_without(engines["onnxruntime"])
    *_, texts, eager = said
    made = compile_text(generator, tmp_path / "int4", "onnxruntime", "int4")
    writer = load_text(made)
    assert abs(perplexity(writer.logits, texts) / perplexity(eager.logits, texts) - 1) < 0.05     # 3 short texts: noisy
    whole = (generator / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 0.35 * whole


def test_a_precision_that_is_not_there_and_a_folder_that_is_not_one_are_refused(generator, tmp_path):
    with pytest.raises(BackendError, match="has no precision 'int2'"):
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
    row = {"engine": "a", "kind": "a", "precision": "int4", "status": "ok", "decode": 99.0, "same": 0.1, "risen": 0.2}
    assert "+20.00%" in TextGate().refusal(row)
    assert TextGate().refusal({**row, "risen": float("nan")}) == "a figure is not a number"
    assert TextGate().refusal({**row, "risen": -0.01}) is None


@pytest.mark.parametrize("name", [name for name in encoder_forms if name not in ("eager", "inductor")])
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
