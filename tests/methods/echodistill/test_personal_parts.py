"""A new word, an adapted network and the pair of models: exact properties."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from flowdistill.conditioning.conditions import Condition
from flowdistill.methods.echodistill.adaptation import TARGETS, adapted
from flowdistill.methods.echodistill.compatibility import check_pair
from flowdistill.methods.echodistill.student import load_adapted_pipeline, save_adaptation
from flowdistill.methods.echodistill.token import TokenEncoder
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from tests.echo_world import TOKEN, student_pipeline, teacher_pipeline
from tests.families import clip_encoder, clip_tokenizer, flux, lively, vae

PROMPTS = ["a red cat", "the sea at night"]


def encoder_of(token=TOKEN, initializer="c", step=1.0):
    return TokenEncoder(clip_tokenizer(), clip_encoder(1), token, initializer, step)


def refused(token=TOKEN, initializer="c"):
    with pytest.raises(UserError) as caught:
        encoder_of(token, initializer)
    return str(caught.value)


# --- the word


def test_prompts_are_encoded_as_the_pipeline_does_and_the_word_starts_as_its_initializer():
    pipeline, encoder = teacher_pipeline(), encoder_of()
    wanted = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    assert torch.equal(encoder(encoder.ids(PROMPTS)), wanted)
    word, plain = encoder(encoder.ids([f"a {TOKEN} here"])), encoder(encoder.ids(["a c here"]))
    assert torch.equal(word, plain) and encoder.replaced(f"a {TOKEN} here") == "a c here"


def test_the_row_of_the_word_is_all_that_gets_a_gradient_and_all_that_moves():
    encoder = encoder_of(step=1.0)
    before = {name: value.clone() for name, value in encoder.encoder.state_dict().items()}
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert trained in (["words.offset"], ["encoder.embeddings.token_embedding.offset"])  # one tensor under two names
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(20):
        encoder(encoder.ids([f"a {TOKEN}", "a c"])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = encoder.encoder.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == ["embeddings.token_embedding.offset"]


def test_the_words_own_rate_is_that_many_times_the_optimisers():
    rows = {}
    for step in (1.0, 25.0):
        words = encoder_of(step=step).words
        optimizer = torch.optim.AdamW([words.offset], lr=1e-3, weight_decay=0.0)
        words(torch.tensor([[words.token]])).sum().backward()
        optimizer.step()
        rows[step] = words.row.detach() - words.initial
    torch.testing.assert_close(rows[25.0], 25 * rows[1.0], rtol=1e-4, atol=1e-7)
    assert rows[1.0].abs().max() == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is its rate


def test_words_that_cannot_be_are_refused():
    assert "has already" in refused(token="b")
    assert "has already" in refused(token="<|endoftext|>")
    assert "one word without spaces" in refused(token="my dog") and "one word" in refused(token="")
    message = refused(initializer="cat")
    assert "3 tokens ('c', 'a', 't</w>')" in message and "initializer_token" in message
    assert "0 tokens (nothing)" in refused(initializer="")
    assert "does not know" in refused(initializer="7")


def test_a_prompt_must_have_the_word_within_the_length():
    encoder = encoder_of()
    encoder.check(f"a {TOKEN}", "the prompt")
    with pytest.raises(UserError, match="the prompt is 'a dog', which does not have the word '<new1>'"):
        encoder.check("a dog", "the prompt")
    with pytest.raises(UserError, match="beyond the 16 tokens"):
        encoder.check("abcdefghijklmnopqrst " + TOKEN, "the prompt")


# --- the adapted network


@pytest.mark.parametrize("kind", TARGETS)
def test_adapted_networks_start_equal_train_apart_and_load_in_stock_diffusers(kind, tmp_path):
    pipeline = student_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    teacher = load_teacher(pipeline)
    network = adapted(teacher.network, kind, 2)
    x, t = torch.randn(2, *teacher.shape), torch.tensor([0.9, 0.3])
    condition = Condition({"prompt_embeds": torch.randn(2, 16, 16)})
    assert torch.equal(network(x, t, condition), teacher.network(x, t, condition))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    places = {name.split(".lora_")[0].removesuffix(".delta").removeprefix("backbone.") for name in trained}
    ends = TARGETS[kind]
    assert places and (ends is None or all(f".{place}".endswith(tuple(f".{end}" for end in ends)) for place in places))
    assert "kv" not in kind or len(places) == 2 * 4  # keys and values of four cross-attentions
    base = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    with torch.no_grad():
        for i, parameter in enumerate(trained.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.2)
        # One step of an optimiser would leave a matrix of rank 1 as well; both ranks must come back.
        wanted = network(x, t, condition)
    assert not torch.allclose(wanted, teacher.network(x, t, condition))
    assert all(torch.equal(base[name], value) for name, value in teacher.network.state_dict().items())
    encoder = TokenEncoder(pipeline.tokenizer, pipeline.text_encoder, TOKEN, "c")
    encoder.words.offset.data.normal_()
    save_adaptation(tmp_path / "changes", network, encoder)
    assert sorted(file.name for file in (tmp_path / "changes").iterdir()) == [
        "comfyui_lora.safetensors", "learned_embeds.safetensors", "pytorch_lora_weights.safetensors",
    ]
    fresh = StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    fresh.load_lora_weights(tmp_path / "changes")
    fresh.load_textual_inversion(tmp_path / "changes")
    loaded = load_teacher(fresh)
    torch.testing.assert_close(loaded.network(x, t, condition), wanted, rtol=1e-5, atol=1e-5)
    prompt = [f"a {TOKEN} on b"]
    torch.testing.assert_close(fresh.encode_prompt(prompt, "cpu", 1, False)[0], encoder(encoder.ids(prompt)))


def test_changes_without_their_base_or_damaged_are_refused(tmp_path):
    pipeline = student_pipeline()
    encoder = TokenEncoder(pipeline.tokenizer, pipeline.text_encoder, TOKEN, "c")
    save_adaptation(tmp_path / "x", adapted(load_teacher(pipeline).network, "kv", 2), encoder)
    with pytest.raises(UserError, match="which is not there; run this where it is"):
        load_adapted_pipeline(str(tmp_path / "gone"), tmp_path / "x")
    file = tmp_path / "x" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_adapted_pipeline(str(tmp_path), tmp_path / "x")


# --- the pair


def pair_problem(change, pipeline=None):
    student = pipeline or student_pipeline()
    change(student)
    with pytest.raises(UserError) as caught:
        check_pair(load_teacher(teacher_pipeline()), load_teacher(student))
    return str(caught.value)


def test_a_pair_may_differ_in_schedule_prediction_and_network():
    check_pair(load_teacher(teacher_pipeline()), load_teacher(student_pipeline()))


def test_another_text_encoder_is_refused():
    def other_weights(student):
        lively(student.text_encoder, seed=5)

    def other_words(student):
        student.tokenizer.add_tokens("zebra")

    message = pair_problem(other_weights)
    assert "another text encoder than the teacher" in message and "weights differ by" in message
    assert "their tokenizers have other words" in pair_problem(other_words)


def test_text_encoders_that_differ_by_rounding_are_told():
    student = student_pipeline()
    student.text_encoder.half().float()
    with pytest.warns(UserWarning, match="differ by"):
        check_pair(load_teacher(teacher_pipeline()), load_teacher(student))


def test_another_latent_space_is_refused():
    def other_scale(student):
        student.vae.register_to_config(scaling_factor=1.7)

    def other_weights(student):
        lively(student.vae, seed=5)

    assert "another latent space" in pair_problem(other_scale)
    message = pair_problem(other_weights)
    assert "the same latents become images" in message and "apart" in message
    student = student_pipeline()
    student.vae = vae(channels=8)
    student.unet = type(student.unet).from_config(student.unet.config | {"in_channels": 8, "out_channels": 8})
    assert "latents of 8 x 8 x 8 and 4 x 8 x 8" in pair_problem(lambda s: None, student)


def test_other_pipelines_are_refused():
    with pytest.raises(UserError, match="method.student .* is a FluxPipeline; .* of the class StableDiffusionPipeline"):
        check_pair(load_teacher(teacher_pipeline()), load_teacher(flux(), image_size=16))
