"""What MSD refuses: one sentence each, and nothing written."""

import re

import pytest

from flowdistill import UserError, load_teacher
from flowdistill.methods.msd.runs import make_partition
from flowdistill.methods.msd.settings import MsdConfig
from flowdistill.methods.score_distillation import Dmd2Config
from tests.families import stable_diffusion
from tests.tiny import tiny_unet_pipeline

PROMPTS = ["a red cat", "two birds", "the sea at night", "a cat", "birds", "the night sea"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A teacher of ten classes of 8x8 images."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    tiny_unet_pipeline(num_class_embeds=10).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method.num_students=11"], "method.num_students is 11, but the teacher has only 10 classes"),
        (["method.partition=file", "method.partition_file={folder}/overlap.yaml"], "overlaps: class 1 is in it"),
        (["method.partition=file", "method.partition_file={folder}/short.yaml"], "leaves out class 9"),
        (["method.partition=file"], "method.partition_file goes with method.partition 'file'"),
        (["method.partition_file=x"], "method.partition_file goes with method.partition 'file'"),
        (["method.partition=balanced_kmeans"], "which splits prompts, and the teacher takes class labels"),
        (["method.partition=alphabetical"], "'method.partition' must be one of sequential, interleaved"),
        (["method.host.name=dmd3"], "'method.host.name' must be one of boot.*, sid, not 'dmd3'; did you mean 'dmd2'"),
        (["method.host.name=msd"], "'method.host.name' is 'msd', which makes no one-step student"),
        (["method.host.weightin=sid"], "unknown key 'method.host.weightin'"),
        (["method.host.critic_updates=0"], "'method.host.critic_updates' must be at least 1"),
        (["method.student_index=2"], "method.student_index is 2; with 2 students it is 0 to 1"),
        (["method.student_index=-1"], "is -1, the shared start, but method.score_matching is null"),
        (["method.host.name=boot", "method.adversarial.steps=5"], "the host 'boot' has no adversarial term"),
        (["method.score_matching={}"], "given by either method.student_size"),
        (["teacher.labels=[1,2]"], "teacher.labels is set, but MSD divides all classes"),
        (["teacher.source={folder}/unconditional"], "the teacher .*unconditional is unconditional: there is"),
        (["train.device=cuda:7"], "train.device"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(source, tmp_path, cli, overrides, sentence):
    (tmp_path / "overlap.yaml").write_text("[[0, 1, 2], [1, 3, 4, 5, 6, 7, 8, 9]]")
    (tmp_path / "short.yaml").write_text("[[0, 1, 2], [3, 4, 5, 6, 7, 8]]")
    if "unconditional" in overrides[0]:
        tiny_unet_pipeline(num_class_embeds=None).save_pretrained(tmp_path / "unconditional")
    (tmp_path / "msd.yaml").write_text(
        f"output_dir: {tmp_path}/run\nteacher: {{source: {source}}}\n"
        "method: {name: msd, num_students: 2, host: {name: dmd2}}\ntrain: {steps: 2, batch_size: 4}\n")
    result = cli("distill", tmp_path / "msd.yaml", *(text.replace("{folder}", str(tmp_path)) for text in overrides))
    assert result.code == 2 and result.err.count("\n") == 1
    assert re.search(sentence, result.err), result.err
    assert not (tmp_path / "run").exists()


def test_a_host_must_be_named(tmp_path, source, cli):
    lines = f"output_dir: {tmp_path}/run\nteacher: {{source: {source}}}\nmethod: {{name: msd}}\n"
    (tmp_path / "msd.yaml").write_text(lines)
    result = cli("distill", tmp_path / "msd.yaml")
    assert result.code == 2 and "'method.host.name' is missing" in result.err


def test_prompts_cannot_be_split_like_classes(tmp_path):
    teacher = load_teacher(stable_diffusion(), prompts=PROMPTS)
    with pytest.raises(UserError, match="which splits classes, and the teacher takes prompts"):
        make_partition(MsdConfig(host=Dmd2Config()), teacher)
    with pytest.raises(UserError, match="num_students is 7, but there are only 6 different prompts"):
        make_partition(MsdConfig(num_students=7, partition="balanced_kmeans", host=Dmd2Config()), teacher)


def test_a_run_that_saved_nothing_may_be_set_right(tmp_path, source, cli):
    lines = (f"output_dir: {tmp_path}/run\nteacher: {{source: {source}}}\n"
             "train: {steps: 1, batch_size: 4, trackers: []}\n"
             "method: {name: msd, num_students: 2, score_matching: {student_size: 1.0e-9}, host: {name: dmd2}}\n"
             "evaluation: {at_end: false}\n")
    (tmp_path / "msd.yaml").write_text(lines)
    result = cli("distill", tmp_path / "msd.yaml")
    assert result.code == 2 and "raise method.student_size" in result.err
    right = ["method.score_matching.student_size=0.5", "method.score_matching_steps=0", "method.num_students=1"]
    assert cli("distill", tmp_path / "msd.yaml", *right).code == 0
    result = cli("distill", tmp_path / "msd.yaml", *right[:2])
    assert result.code == 2 and "holds another run: method.num_students is 1 there and 2 here" in result.err
