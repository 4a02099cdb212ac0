"""Trains the demonstration model on pictures that it draws itself.

    python tools/train_demo/train.py --out /tmp/demo                    # all stages
    python tools/train_demo/train.py --out /tmp/demo --stages joint,finish --minutes 30   # goes on
    python tools/train_demo/train.py --out /tmp/demo --start python/internvl_rt/demo_model

Stages: `tower` teaches the vision tower what lies in every patch; `answer` the decoder with the
tower frozen, one task after the other; `whole` all of it, at 112 and at 224 pixels, with the dense
loss kept; `places` the tower again, with large things; `relate` the decoder on two things and where
they are; `joint` everything, also pictures of any shape, as a thumbnail or as several tiles;
`finish` the same with numbers and relations foremost; `polish` with numbers and counts; `settle`
the same at a third of the rates. A stage runs for its minutes: the learning rate and the mixture
follow the clock, so a faster machine sees more pictures. OUT/state.pt is written every few minutes
and read at the start; OUT/log.jsonl gets loss and held-out accuracy. Uses a GPU when there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import data
import draw
import world
from model import Demo, Sizes
from optimizer import Optimizer
from tokens import Writer, make_tokenizer, pad

BACKGROUND_WEIGHT = 0.15
LONGEST = 32  # tokens of an answer in an exam
REPORT_SECONDS = 480
DENSE_WEIGHTS = {"kind": 1.0, "colour": 0.3, "box": 0.3, "centre": 0.2, "place": 0.1}
TOKEN_WEIGHTS = {"token_place": 0.05, "token_centre": 0.2, "token_box": 1.0}
NAME_WEIGHTS = {"name_place": 0.2, "name_box": 1.0}


@dataclass(frozen=True)
class Stage:
    """minutes on two cores; rates: learning rate by the beginning of a parameter's name.

    decay: the last share of the stage, over which the rate falls to a twentieth.
    """

    minutes: float
    rates: dict[str, float]
    plan: data.Plan
    dense: float  # weight of the dense loss
    exam_side: int
    decay: float = 0.4


_PAGES = data.Source("page", 112, 64)
_SMALL, _LARGE = data.Source("scene", 112, 64), data.Source("scene", 224, 20)
_PLACES = data.Source("page", 224, 20)
_TOWER = {"vision_model.": 2e-3, "dense.": 2e-3}
_TEXT = {"mlp1.": 2e-3, "language_model.": 2e-3}
_ALL = {"vision_model.": 4e-4, "dense.": 1e-3, "mlp1.": 1e-3, "language_model.": 1e-3}
_PLACED = {"vision_model.": 1e-3, "dense.": 1.5e-3}
_DECODER = {"mlp1.": 1.2e-3, "language_model.": 1.2e-3, "dense.": 1e-3}
_JOINT = {"vision_model.": 3e-4, "dense.": 1e-3, "mlp1.": 1.2e-3, "language_model.": 1.2e-3}
_SCENES, _SHAPED = data.Source("scene", 224, 16), data.Source("thumbnail", 224, 16)
_FEW_SMALL, _FEW_TILES = data.Source("scene", 112, 40), data.Source("tiles", 224, 6)
_FINISH = {"vision_model.": 2.5e-4, "dense.": 8e-4, "mlp1.": 1e-3, "language_model.": 1e-3}
_PAIRS = data.Source("pair", 224, 12)
_POLISH = {"vision_model.": 2e-4, "dense.": 8e-4, "mlp1.": 8e-4, "language_model.": 8e-4}
_SETTLE = {"vision_model.": 6e-5, "dense.": 3e-4, "mlp1.": 3e-4, "language_model.": 3e-4}
_LOOKING = (*[data.Source("scene", 224, 32)] * 4, data.Source("thumbnail", 224, 32))
_LOOKING += (data.Source("pair", 224, 24),)
_LOOKED_UP = {"relation": 6.0, "number": 1.5, "count": 2.0, "emoji": 0.6}
_LOOKED_UP |= {"shape and colour": 0.3, "outside": 0.3}
_RELATIONS = data.WEIGHTS | {"relation": 2.4, "count": 1.6, "emoji": 0.5}
_EVERY_SHAPE = (_SCENES, _FEW_TILES, _SCENES, _SHAPED, _PAIRS, _SCENES, _FEW_TILES, _SHAPED)


def _late(
    name: str, minutes: float, rates: dict[str, float], weights: dict[str, float], boxes: float
) -> Stage:
    """A stage for everything in every shape, whose rate falls from its beginning on."""
    plan = data.Plan(name, _EVERY_SHAPE, weights=data.WEIGHTS | weights, boxes=boxes)
    return Stage(minutes, rates, plan, 0.5, 224, decay=1.0)


STAGES = {
    "tower": Stage(32, _TOWER, data.Plan("tower", (_PAGES,)), 1.0, 112),
    "answer": Stage(14, _TEXT, data.Plan("answer", (_SMALL,), staged=True), 0.0, 112),
    "whole": Stage(22, _ALL, data.Plan("whole", (_SMALL, _SMALL, _SMALL, _LARGE)), 0.5, 112),
    "places": Stage(
        20, _PLACED, data.Plan("places", (_PAGES, _PLACES, _PLACES)), 1.0, 224, decay=0.5
    ),
    "relate": Stage(
        30,
        _DECODER,
        data.Plan("relate", _LOOKING, weights=_LOOKED_UP, room=160, boxes=0.8),
        0.0,
        224,
        decay=0.2,
    ),
    "joint": Stage(
        30,
        _JOINT,
        data.Plan(
            "joint",
            (_SCENES, _FEW_TILES, _SCENES, _SHAPED, _FEW_SMALL, _SCENES, _FEW_TILES, _PLACES),
            weights=_RELATIONS,
        ),
        0.5,
        224,
        decay=0.9,
    ),
    "finish": _late("finish", 30, _FINISH, {"number": 3.0, "relation": 3.0}, boxes=0.6),
    "polish": _late(
        "polish", 24, _POLISH, {"number": 3.0, "count": 3.5, "relation": 1.2}, boxes=0.15
    ),
    "settle": _late(
        "settle", 9, _SETTLE, {"number": 5.0, "count": 3.0, "relation": 1.2}, boxes=0.05
    ),
}


def rate_factor(progress: float, decay: float) -> float:
    """Warm-up over 2 % of a stage, flat, then linear to a twentieth."""
    return min(progress / 0.02, 1.0, max(0.05, (1 - progress) / decay))


class Trainer:
    def __init__(self, out: Path, device: str, start: Path | None = None) -> None:
        """start: a checkpoint whose weights to begin with where OUT has no state."""
        torch.manual_seed(0)
        self.out, self.device = out, device
        self.sizes = Sizes()
        self.tokenizer = make_tokenizer(self.sizes.vocab)
        self.writer = Writer(self.tokenizer)
        model = Demo(self.sizes, world.class_count(), len(world.COLOUR_NAMES))
        self.model = model.to(device, torch.bfloat16)
        self.optimizer = Optimizer(self.model)
        weight = torch.ones(world.class_count(), device=device)
        weight[0] = BACKGROUND_WEIGHT
        self.kind_weight, self.centre_weight = weight, torch.tensor(4.0, device=device)
        out.mkdir(parents=True, exist_ok=True)
        state = out / "state.pt"
        if state.exists():
            self.optimizer.load(torch.load(state, map_location=device))
        elif start is not None:
            masters = load_file(start / "model.safetensors", device=device)
            self.optimizer.load({"masters": masters, "first": {}, "second": {}, "steps": 0})

    def run(self, name: str, stage: Stage, minutes: float, workers: int) -> None:
        plan = replace(stage.plan, vocab=self.sizes.vocab)
        loader = data.Loader(plan, workers)
        begin = saved = shown = time.monotonic()
        seen = steps = 0
        losses: dict[str, float] = {}
        try:
            for arrays in loader:
                progress = (time.monotonic() - begin) / (60 * minutes)
                if progress >= 1:
                    break
                loader.progress.value = progress
                factor = rate_factor(max(progress, 1e-4), stage.decay)
                found = self.losses(name, stage, arrays)
                sum(found.values()).backward()
                norm = self.optimizer.step({k: v * factor for k, v in stage.rates.items()})
                seen, steps = seen + len(arrays["pixels"]), steps + 1
                figures = {k: float(v.detach()) for k, v in found.items()} | {"norm": norm}
                for key, value in figures.items():
                    losses[key] = 0.95 * losses.get(key, value) + 0.05 * value
                now = time.monotonic()
                if now - shown > 10:
                    shown = now
                    self.show(name, progress, seen, seen / (now - begin), losses)
                if now - saved > REPORT_SECONDS:
                    self.report(name, stage, seen, now - begin, losses, 48)
                    saved = time.monotonic()
                    begin += saved - now  # examining does not count as training
        finally:
            loader.close()
        self.report(name, stage, seen, time.monotonic() - begin, losses, 200)

    def losses(self, name: str, stage: Stage, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        pixels = data.normalise(arrays["pixels"], self.device, torch.bfloat16)
        room = self.sizes.grid - pixels.shape[-1] // draw.PATCH
        corner = tuple(np.random.default_rng(arrays["pixels"].sum()).integers(0, room + 1, 2))
        found = {}
        with torch.set_grad_enabled(stage.rates.get("vision_model.", 0) > 0):
            features = self.model.vision_model(pixels, corner)
        if stage.dense:
            dense = self.dense_losses(features[:, 1:], corner, arrays)
            found |= {k: stage.dense * DENSE_WEIGHTS[k] * v for k, v in dense.items()}
        if "after" in arrays:
            pictures = self.model.project(features)
            known = self.token_losses(pictures, corner, arrays)
            found |= {k: TOKEN_WEIGHTS[k] * v for k, v in known.items()}
            if "tiles" in arrays:
                pictures = torch.cat((self.tiles(arrays["tiles"]), pictures), 1)
            answer, known = self.text_losses(pictures, arrays)
            found |= {k: NAME_WEIGHTS[k] * v for k, v in known.items()}
            found["answer"] = answer
        return found

    def dense_losses(
        self, features: Tensor, corner: tuple[int, int], arrays: dict[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """Of what every patch should know: `Picture.labels`, and its place."""
        heads, patches = self.model.dense, features.flatten(0, 1)
        kinds, colours, boxes, centres = (
            torch.as_tensor(arrays[k]).to(self.device).flatten(0, 1)
            for k in ("kinds", "colours", "boxes", "centres")
        )
        things, coloured = kinds > 0, colours >= 0
        shift = torch.tensor([corner[1], corner[0]] * 2, device=self.device)
        boxes = (boxes[things] + shift) / self.sizes.grid
        tints = heads["colour"](patches[coloured]).float()
        tint = F.cross_entropy(tints, colours[coloured], reduction="sum")
        reach = F.l1_loss(heads["box"](patches[things]).float(), boxes, reduction="sum")
        return {
            "kind": F.cross_entropy(heads["kind"](patches).float(), kinds, self.kind_weight),
            "colour": tint / max(len(tints), 1),
            "box": reach / max(boxes.numel(), 1),
            "centre": F.binary_cross_entropy_with_logits(
                heads["centre"](patches)[:, 0].float(), centres, pos_weight=self.centre_weight
            ),
            "place": self.place_loss(("row", "column"), features, corner),
        }

    def place_loss(
        self, heads: tuple[str, str], features: Tensor, corner: tuple[int, int], step: int = 1
    ) -> Tensor:
        """Everything knows its row and column: what the relations between things are made of.

        features: [B, n, C] of a square, each of step x step patches.
        """
        B, n, _ = features.shape
        g = math.isqrt(n)
        rows, columns = torch.meshgrid(
            *(step * torch.arange(g) + int(c) for c in corner), indexing="ij"
        )
        found = 0.0
        for head, place in zip(heads, (rows, columns), strict=True):
            labels = place.flatten().repeat(B).to(features.device)
            logits = self.model.dense[head](features).float().flatten(0, 1)
            found = found + F.cross_entropy(logits, labels)
        return found

    def token_losses(
        self, tokens: Tensor, corner: tuple[int, int], arrays: dict[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """Of what every token should know: its place, whether a thing has its centre there, and
        the box of the thing that it is part of, where it is part of one alone.
        """
        heads = self.model.dense
        centres, kinds, boxes = (
            _by_token(torch.as_tensor(arrays[k]).to(self.device))
            for k in ("centres", "kinds", "boxes")
        )  # [B, n, 4] and [B, n, 4, 4]
        given = heads["token_centre"](tokens).float().squeeze(-1)
        things = (kinds > 0)[..., None]
        low = boxes.masked_fill(~things, math.inf).amin(2)
        high = boxes.masked_fill(~things, -math.inf).amax(2)
        alone = (low == high).all(-1)
        shift = torch.tensor([corner[1], corner[0]] * 2, device=self.device)
        reach = heads["token_box"](tokens[alone]).float()
        missed = (reach - (low[alone] + shift) / self.sizes.grid).abs().sum()
        return {
            "token_place": self.place_loss(("token_row", "token_column"), tokens, corner, 2),
            "token_centre": F.binary_cross_entropy_with_logits(given, centres.amax(2)),
            "token_box": missed / max(reach.numel(), 1),
        }

    def tiles(self, tiles: np.ndarray) -> Tensor:
        """uint8 [B, t, S, S, 3] -> embeddings [B, t * n, W], without gradient: they come first."""
        B, t = tiles.shape[:2]
        pixels = data.normalise(tiles.reshape(B * t, *tiles.shape[2:]), self.device, torch.bfloat16)
        with torch.no_grad():
            found = self.model.project(self.model.vision_model(pixels))
        return found.reshape(B, -1, found.shape[-1])

    def text_losses(
        self, pictures: Tensor, arrays: dict[str, np.ndarray]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the answers' tokens by weight, and what is known of names.

        No conversation begins with an answer.
        """
        before, after, weights, branch, position = (
            torch.as_tensor(arrays[k]).to(self.device)
            for k in ("before", "after", "weights", "branch", "position")
        )
        states, looked_up = self.states(before, pictures, after, branch, position)
        known = self.name_losses(looked_up, torch.as_tensor(arrays["named"]).to(self.device))
        asked = weights[:, 1:] > 0
        loss = F.cross_entropy(
            self.model.logits(states[:, :-1][asked]), after[:, 1:][asked], reduction="none"
        )
        weights = weights[:, 1:][asked]
        return (loss * weights).sum() / weights.sum(), known

    def name_losses(self, states: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Of what every name in a text should know: the place and the box of its thing.

        boxes: [B, T, 4] in patches, NaN where no name ends.
        """
        named = ~boxes[..., 0].isnan()
        if not named.any():
            return {}
        states, boxes, g = states[named], boxes[named], self.sizes.grid
        states = F.rms_norm(states, states.shape[-1:])
        centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).long().clamp(0, g - 1)
        heads = self.model.dense
        place = sum(
            F.cross_entropy(heads[head](states).float(), centres[:, axis])
            for axis, head in enumerate(("name_column", "name_row"))
        )
        return {
            "name_place": place,
            "name_box": F.l1_loss(heads["name_box"](states).float(), boxes / g),
        }

    def states(
        self, before: Tensor, pictures: Tensor, after: Tensor, branch: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of `after`: what Demo.decode gives. before, after: ids [B, T]; pictures: the embeddings
        [B, n, W] that stand for n of `before`.

        branch, position: [B, T] of `after`, as in Conversation.
        """
        x = self.model.embed(torch.cat((before, after), 1))
        place = (before == self.writer.context)[..., None]
        x[:, : before.shape[1]] = x[:, : before.shape[1]].masked_scatter(place, pictures)
        shared = torch.arange(before.shape[1], device=x.device).expand(len(x), -1)
        found = self.model.decode(
            x,
            torch.cat((torch.zeros_like(shared), branch + 1), 1),
            torch.cat((shared, position + shared.shape[1]), 1),
        )
        return tuple(states[:, -after.shape[1] :] for states in found)

    # Exams

    @torch.no_grad()
    def answers(
        self, pictures: list[draw.Picture], conversations: list[list[tuple[str, str, str]]]
    ) -> list[str]:
        """Greedy answers to the last turn of every conversation about a picture."""
        shown = [[p] if p.first is None else [p.first, p] for p in pictures]
        pixels = np.array([[p.pixels for p in both] for both in shown])
        embedded = self.tiles(pixels)
        tokens = [data.tokens_of(pixels.shape[2])] * pixels.shape[1]
        talks = [
            self.writer.conversation([q[1:] for q in turns], last_answer=False, tokens=tokens)
            for turns in conversations
        ]
        before = torch.tensor([t.before for t in talks], device=self.device)
        rows = [list(t.after) for t in talks]
        starts, end = [len(r) for r in rows], self.tokenizer.token_to_id("<|im_end|>")
        for _ in range(LONGEST):
            after = torch.as_tensor(pad(rows, 0)).to(self.device)
            position = torch.arange(after.shape[1], device=self.device).expand_as(after)
            states, _ = self.states(before, embedded, after, torch.zeros_like(after), position)
            at = torch.tensor([len(r) - 1 for r in rows], device=self.device)
            best = self.model.logits(states[torch.arange(len(rows)), at]).argmax(-1).tolist()
            for row, token in zip(rows, best, strict=True):
                row.append(token)
            if all(end in r[s:] for r, s in zip(rows, starts, strict=True)):
                break
        cut = [[*r[s:], end] for r, s in zip(rows, starts, strict=True)]
        return [self.tokenizer.decode(c[: c.index(end)], skip_special_tokens=False) for c in cut]

    def examine(self, side: int, count: int) -> dict[str, float]:
        """Per cent of exact answers per task, unseen pictures and fonts."""
        scores = {}
        for task in (*world.TASKS, "outside"):
            pictures = data.exam(task, side, count, held_out=True, seed=1)
            right = 0
            for i in range(0, count, 50):
                part = pictures[i : i + 50]
                asked = [p.turns[:1] for p in part]
                if task == "second turn":  # after its own answer to the other
                    before = self.answers(part, [p.turns[1:2] for p in part])
                    asked = [
                        [(*p.turns[1][:2], said), p.turns[0]]
                        for p, said in zip(part, before, strict=True)
                    ]
                given = self.answers(part, asked)
                right += sum(data.right(a, p.turns[0][2]) for a, p in zip(given, part, strict=True))
            scores[task] = round(100 * right / count, 1)
        return scores

    @torch.no_grad()
    def examine_patches(self, side: int, count: int) -> dict[str, float]:
        """Per cent of patches of unseen pages and fonts whose content the tower knows."""
        rng = np.random.default_rng(2)
        pages = [draw.page(rng, side, held_out=True) for _ in range(count)]
        pixels = data.normalise(np.stack([p.pixels for p in pages]), self.device, torch.bfloat16)
        patches = self.model.vision_model(pixels)[:, 1:].flatten(0, 1)
        labels = [p.labels() for p in pages]
        kinds, colours = (
            torch.as_tensor(np.concatenate([x[k] for x in labels])) for k in ("kinds", "colours")
        )
        right = self.model.dense["kind"](patches).argmax(-1).cpu() == kinds
        tint = self.model.dense["colour"](patches).argmax(-1).cpu() == colours
        groups = {
            "background": kinds == 0,
            "digits": (kinds >= world.DIGIT_CLASS) & (kinds < world.SHAPE_CLASS),
            "shapes": (kinds >= world.SHAPE_CLASS) & (kinds < world.EMOJI_CLASS),
            "emoji": kinds >= world.EMOJI_CLASS,
        }
        scores = {k: round(100 * float(right[g].float().mean()), 1) for k, g in groups.items()}
        scores["colours"] = round(100 * float(tint[colours >= 0].float().mean()), 1)
        return scores

    # Reports

    def show(self, name: str, progress: float, seen: int, speed: float, losses: dict) -> None:
        bar = "#" * round(20 * progress)
        figures = " ".join(f"{k} {v:.3f}" for k, v in losses.items())
        print(f"{name} [{bar:20}] {seen} pictures, {speed:.0f}/s, {figures}", flush=True)

    def report(
        self, name: str, stage: Stage, seen: int, seconds: float, losses: dict, count: int
    ) -> None:
        torch.save(self.optimizer.state(), self.out / "state.new")
        (self.out / "state.new").replace(self.out / "state.pt")
        entry = {"stage": name, "pictures": seen, "seconds": round(seconds)}
        entry |= {k: round(v, 4) for k, v in losses.items()}
        entry["patches"] = self.examine_patches(stage.exam_side, count)
        if stage.plan.sources[0].kind != "page":
            entry["answers"] = self.examine(stage.exam_side, count)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


def _by_token(patches: Tensor) -> Tensor:
    """Values of the patches [B, g^2, ...] -> of the four of every token [B, (g / 2)^2, 4, ...]."""
    B, n, *rest = patches.shape
    g = math.isqrt(n)
    x = patches.view(B, g // 2, 2, g // 2, 2, *rest).transpose(2, 3)
    return x.reshape(B, n // 4, 4, *rest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of state and log")
    parser.add_argument("--start", type=Path, help="checkpoint to begin with, else from nothing")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in order")
    parser.add_argument("--minutes", type=float, help="of every stage, instead of its own")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    given = parser.parse_args()
    names = given.stages.split(",")
    if unknown := [n for n in names if n not in STAGES]:
        parser.error(f"--stages has {unknown[0]!r}, allowed: {', '.join(STAGES)}")
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(given.out, device, given.start)
    for name in names:
        stage = STAGES[name]
        trainer.run(name, stage, given.minutes or stage.minutes, given.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
