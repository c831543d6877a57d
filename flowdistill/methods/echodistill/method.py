"""EchoDistill (Yang et al., arXiv 2510.20512; its second version is OPAD): a concept for a one-step student.

Each step, with the concept's pictures x and their prompts c, which have one new word:

    teacher        || v_T(x_t, t, c) - (n - x) ||^2, in the units of the network's output; trains the word too
    student        x_S = G(n, c);  x_T = the teacher's guided denoising of x_S, noised by the same n to a random t
                   a(t) [ w_1 latents + w_2 identity + w_3 texture ](x_S, x_T) + sum_k softplus(-D_k(x_S))
    discriminator  sum_k [ softplus(D_k(x_S)) + softplus(-D_k(x)) ] / 2, D_k a small head on a frozen network

The word learns from the teacher's loss alone; the student answers it through its own adaptation. Ours are the prior
terms, which hold both models at what they were for other prompts, and the details of the echo stage.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompts import PromptList
from flowdistill.config import validate
from flowdistill.features.vision import Vision, load_vision, vision_files
from flowdistill.methods.echodistill.adaptation import adapted
from flowdistill.methods.echodistill.alignment import AlignmentTerms
from flowdistill.methods.echodistill.compatibility import check_pair
from flowdistill.methods.echodistill.concept import Concept, KeptPrompts
from flowdistill.methods.echodistill.concept_images import concept_files
from flowdistill.methods.echodistill.echo import EchoStage
from flowdistill.methods.echodistill.judge import Judge
from flowdistill.methods.echodistill.networks import ConceptTeacher, DiscriminatorHeads
from flowdistill.methods.echodistill.output import publish
from flowdistill.methods.echodistill.settings import EchoDistillConfig
from flowdistill.methods.echodistill.student import ConceptStudent, one_step_time
from flowdistill.methods.echodistill.token import TokenEncoder, TokenPrompts
from flowdistill.networks.critic import critic_loss
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.objectives import adversarial, alignment
from flowdistill.objectives import distribution_matching as dm
from flowdistill.students import StudentInfo, generated
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.teachers.weight_files import NamedFiles
from flowdistill.training.method import About, Figures, Method, Networks, Role, register_method
from flowdistill.training.state import network_tensors
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw, indexed_noise
from flowdistill.utils.text import JsonObject

AT_ONCE = 32


@register_method
class EchoDistill(Method):
    """A method with stages that leaves the teacher's adaptation beside its student."""

    name = "echodistill"
    own_cards = True
    Config = EchoDistillConfig
    about = About("a new concept, from a few pictures, for a student of one call that is there already",
                  "EchoDistill, arXiv 2510.20512", data="a few pictures", calls="1",
                  networks="teacher, discriminators")
    shards = False  # its pictures are made by the main process alone
    student_roles = ("student", "teacher")  # the word is the teacher's to learn

    def __init__(self, config: EchoDistillConfig, teacher: Teacher, student: DiffusionPipeline | None = None) -> None:
        """``student``: a live pipeline in the place of ``config.student``."""
        validate(config, prefix="method.")
        self.config, self.teacher = config, teacher
        if teacher.prompts is None:
            raise UserError(f"teacher.source {teacher.source} is no text-to-image pipeline, which echodistill needs")
        if teacher.lora is not None:
            raise UserError(f"teacher.lora is set, but {self.name} writes LoRA files of teacher.source itself; save "
                            "that pipeline with the LoRA in its weights (fuse_lora) and give it as teacher.source")
        for levels in (config.time, config.alignment_time):
            levels.check(teacher)
        size = teacher.prompts.image_size
        try:
            self.source = load_teacher(student or config.student, image_size=size)
        except UserError as error:
            raise UserError(f"method.student cannot be the student: {error}") from error
        check_pair(teacher, self.source)
        if teacher.vae is not None:
            self.source.take_autoencoder(teacher)
        start = one_step_time(self.source)
        step = (config.token_lr or config.teacher_optimizer.lr) / config.teacher_optimizer.lr
        with teacher.prompts.text.opened(torch.device("cpu")) as text:
            self.word = TokenEncoder(
                text.tokenizer, text.text_encoder, config.placeholder_token, config.initializer_token, step
            )
        self.concept = Concept(config, self.word, size)
        self.kept = KeptPrompts(teacher, self.source, start, self.word)
        feature_networks: dict[str, Vision] = {}
        echoes = config.echo.start is not None
        seen_by = config.echo.identity if echoes and config.echo.identity is not None else config.identity
        for key, names in (("identity", [config.identity]), ("echo.identity", [seen_by]),
                           ("discriminators", config.discriminators)):
            new = [name for name in names if name not in feature_networks]
            feature_networks |= {name: load_vision(name, f"method.{key}") for name in new}
        self.patches = echoes and config.echo.features == "patches"
        self.judging = feature_networks[seen_by]
        if self.patches and self.judging.num_places == 1:
            named = "method.identity" if config.echo.identity is None else "method.echo.identity"
            raise UserError(f"method.echo.features is patches, but {named} {seen_by} sees the whole "
                            "picture only; give a network with features of places, a vision transformer for example "
                            "(transformers:FOLDER, timm:NAME=FILE), or take pooled")
        self.feature_networks = nn.ModuleList(feature_networks.values())
        self.critics = [feature_networks[name] for name in config.discriminators]
        null_ids = self.word.ids([teacher.prompts.negative or ""])
        self.align = AlignmentTerms(config, teacher, feature_networks[config.identity], null_ids)
        guide = ConceptTeacher(adapted(teacher.network, config.adapter, config.rank), self.word)
        network = ExtendedVelocity(adapted(self.source.network, config.adapter, config.rank))
        info = StudentInfo(self.name, config.student, settings={"teacher": teacher.source})
        self._student = ConceptStudent.around(network, self.source, start, info)
        self._student.prompts = TokenPrompts(self.word, teacher.prompts)
        shown = config.validation_prompts or [config.instance_prompt]
        self._student.prompts.use(PromptList(shown, [1 / len(shown)] * len(shown)))
        self._roles = {
            "teacher": Role(guide, config.teacher_optimizer),
            "student": Role(network, config.optimizer),
        }
        if self.critics:
            heads = DiscriminatorHeads([critic.width for critic in self.critics])
            self._roles["discriminator"] = Role(heads, config.discriminator_optimizer)
        self.echo = EchoStage(config.echo, self._judge, self.sample_images, self.trained, self.concept.echo,
                              self.concept.prompts)

    def roles(self) -> dict[str, Role]:
        return self._roles

    def schedule(self, step: int) -> tuple[str, ...]:
        return tuple(self._roles)

    @classmethod
    def check_length(cls, config: EchoDistillConfig, steps: int) -> str | None:
        return config.echo.check_steps(steps)

    # --- the losses

    def loss(self, role: str, networks: Networks, draw: Draw) -> tuple[Tensor, Figures]:
        if role == "teacher":
            return self._teacher_loss(networks, draw)
        return self._student_loss(networks, draw) if role == "student" else self._discriminator_loss(networks, draw)

    def _teacher_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, Figures]:
        teacher, weight = self.teacher, self.config.teacher_prior_loss_weight
        images, ids = self.concept.draw(draw, self.echo.pool)
        clean, noise = teacher.codec.encode(images), draw.normal(teacher.shape)
        time = self.config.time.draw(teacher, draw)
        state = dm.noised(clean, noise, time)
        if not weight:
            velocity = networks["teacher"](state, time, ids)
            return critic_loss(velocity, clean, noise, time, teacher.path).mean(), {}
        before, _, condition, kept_ids = self.kept.draw(draw)
        kept_time = self.config.time.draw(teacher, draw)
        known = dm.noised(before, draw.normal(teacher.shape), kept_time)
        with torch.no_grad():
            target = teacher.velocity(known, kept_time, condition)
        both = torch.cat([state, known]), torch.cat([time, kept_time]), torch.cat([ids, kept_ids])
        velocity, held = networks["teacher"](*both).chunk(2)
        learned = critic_loss(velocity, clean, noise, time, teacher.path).mean()
        # The frozen teacher's velocity in the place of n - x: the same loss, in the same units.
        prior = critic_loss(held, torch.zeros_like(target), target, kept_time, teacher.path).mean()
        return learned + weight * prior, {"reconstruction": learned.detach(), "prior": prior.detach()}

    def _student_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, Figures]:
        config, noise = self.config, draw.normal(self.teacher.shape)
        with torch.no_grad():
            ids, pictured = self.concept.draw_prompts(draw, self.echo.pool)
            embeds = networks["teacher"](ids=ids)
        terms: Figures = {}
        if config.prior_loss_weight:
            before, other, condition, _ = self.kept.draw(draw)
            both = torch.cat([embeds, condition.tensors["prompt_embeds"].to(embeds)])
            sample, held = self.generate(networks, torch.cat([noise, other]), both).chunk(2)
            terms["prior"] = config.prior_loss_weight * alignment.latent_distance(held, before)
        else:
            sample = self.generate(networks, noise, embeds)
        pictures = self.teacher.codec.pixels(sample)
        terms |= self.align(networks["teacher"], draw, sample, pictures, noise, embeds)
        if self.critics:
            logits = networks["discriminator"]([critic(pictures).pooled for critic in self.critics])
            terms["adversarial"] = config.adversarial_weight * pictured * adversarial.generator_loss(logits).sum(1)
        means = {name: value.mean() for name, value in terms.items()}
        return torch.stack(list(means.values())).sum(), {name: value.detach() for name, value in means.items()}

    def _discriminator_loss(self, networks: Networks, draw: Draw) -> tuple[Tensor, Figures]:
        real, ids = self.concept.draw(draw, self.echo.pool)
        with torch.no_grad():
            embeds = networks["teacher"](ids=ids)  # so that prompts do not tell samples from pictures
            sample = self.generate(networks, draw.normal(self.teacher.shape), embeds)
            pictures = torch.cat([self.teacher.codec.pixels(sample), real])
            seen = [critic(pictures).pooled for critic in self.critics]
        fake, true = networks["discriminator"](seen).chunk(2)
        told = ((fake < 0).float().mean() + (true > 0).float().mean()) / 2
        return 0.5 * adversarial.discriminator_loss(fake, true).sum(1).mean(), {"discriminator_accuracy": told.detach()}

    def generate(self, networks: Networks, noise: Tensor, embeds: Tensor) -> Tensor:
        """The student's samples (B, *shape) of the noise, for prompts' embeddings (B, tokens, channels)."""
        condition = Condition({"prompt_embeds": embeds})
        return generated(networks["student"], noise, self._student.t_start, condition)

    # --- the echo stage

    def check_start(self) -> None:
        self.echo.check()

    def begin_step(self, step: int, folder: Path) -> Sequence[str]:
        return tuple(self._roles) if self.echo.begin(step, folder) else ()

    def learning_rate_factor(self, role: str, step: int) -> float:
        return self.echo.rate(step)

    def state_dict(self) -> JsonObject:
        return {"echo": self.echo.history}

    def load_state_dict(self, state: JsonObject) -> None:
        self.echo.history = list(state["echo"])

    def trained(self) -> dict[str, Tensor]:
        """Everything that trains, by role and name."""
        return {f"{name}.{key}": value for name, role in self._roles.items()
                for key, value in network_tensors(role.network).items()}

    @torch.no_grad()
    def sample_images(self, model: str, numbers: Tensor, seed: int, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Latents and pictures, on the CPU, by ``model`` for the concept's prompts of these numbers (B,).

        Args:
            model: "student", "teacher" (in ``steps``, or ``teacher_steps``), both as they stand, or "before": the
                untrained student, with the initializer in the place of the new word.
        """
        texts, latents = [self.concept.prompts[i] for i in numbers.tolist()], []
        for rows in torch.arange(len(texts)).split(AT_ONCE):
            noise = indexed_noise(self.teacher.shape, seed, rows.tolist()).to(self.teacher.device)
            some = [texts[i] for i in rows.tolist()]
            if model == "before":
                plain = self.source.encode(prompts=[self.word.replaced(text) for text in some])
                made = generated(self.source.network, noise, self._student.t_start, plain)
            elif model == "student":
                made = self._student(noise, self._student.encode(prompts=some))
            else:
                scale = self.config.teacher_guidance_scale
                made = self.concept_teacher().sample(
                    noise, self._student.encode(prompts=some), steps or self.config.teacher_steps, guidance_scale=scale
                )
            latents.append(made.cpu())
        joined = torch.cat(latents)
        parts = [self.teacher.decode(part.to(self.teacher.device)).cpu() for part in joined.split(AT_ONCE)]
        return joined, torch.cat(parts)

    def concept_teacher(self) -> Teacher:
        """The teacher with its adaptation as it stands."""
        teacher = copy.copy(self.teacher)
        teacher.network = self._roles["teacher"].network.velocity
        return teacher

    def _judge(self) -> Judge:
        _, ordinary = self.sample_images("before", self.concept.echo.repeat(4), 0)
        plain = [self.word.replaced(text) for text in self.concept.prompts]
        concept = self.concept
        return Judge(self.teacher, self.judging, concept.images, ordinary, plain, concept.masks,
                     self.patches)

    # --- what remains

    def conclude(self, step: int, folder: Path) -> None:
        self.echo.conclude(step, folder)

    def write_outputs(self, folder: Path) -> None:
        publish(self, folder)

    def outputs_complete(self, folder: Path) -> bool:
        return (folder / "student" / "README.md").is_file()  # the last file that is written

    def contents(self) -> str:
        stage = "echo/, " if self.echo.history else ""
        return f"student/ and teacher/ with their cards, {stage}samples/, metrics.jsonl, config.yaml"

    def files(self) -> NamedFiles:
        config, student = self.config, self.source.files().get("teacher.source", {})
        if self.teacher.vae is not None:  # which stands in the place of the student's own as well
            student = {name: file for name, file in student.items() if not name.startswith("vae/")}
        networks = {"method.identity": [config.identity], "method.discriminators": config.discriminators}
        if config.echo.start is not None and config.echo.identity is not None:
            networks["method.echo.identity"] = [config.echo.identity]
        found = {setting: {f"{number} {file}": path for number, name in enumerate(names)
                           for file, path in vision_files(name).items()} for setting, names in networks.items()}
        found["method.instance_data_dir"] = concept_files(config.instance_data_dir)
        return {"method.student": student} | {setting: files for setting, files in found.items() if files}

    def student(self, network: nn.Module | None = None) -> ConceptStudent:
        return self._student if network is None else self._student.with_network(network)

    def to(self, device: torch.device | str) -> EchoDistill:
        # The teacher last: an autoencoder that it shares with the student rests where the teacher's settings say.
        for part in (self.source, self._student, self.teacher, self.feature_networks, self.concept, self.kept):
            part.to(device)
        for role in self._roles.values():
            role.network.to(device)
        return self
