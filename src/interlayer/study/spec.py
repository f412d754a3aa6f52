"""What is compared: a study as data, from a TOML file, from the command line or from Python. Never imports torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from interlayer import catalog
from interlayer.study.stats import looks

__all__ = ["ArmSpec", "StudyError", "StudySpec", "split_top"]


GIVEN = "python:"  # what a text begins with that stands for an object of Python; see `study.objects`
SEARCH_SEED = 1000  # of the search for learning rates; judged seeds start at 0


class StudyError(ValueError):
    """A study that cannot be run as written; the message names the key and says what was wanted."""


class ArmSpec(BaseModel):
    """One arm: a name for the report and what it is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="how the arm is called in the report")
    use: str = Field(min_length=1, description='what the arm is made of, such as "plain" or "denseformer+lr=0.002"')


TRAINED_STEPS = 1500  # in which a base that is named after its task learns it


class StudySpec(BaseModel):
    """A comparison: task, base, arms, seeds and budget. Every field is a key of the TOML file.

    Examples:
        >>> spec = StudySpec(task="digits", arms=["plain", "rezero"], seeds=3, steps=100)
        >>> [arm.name for arm in spec.arms]
        ['plain', 'rezero']
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: str = Field(
        default="stdlib-bytes",
        description=f"what is learned: {', '.join(catalog.tasks())}, package.module:function, file:PATH or hf:NAME; a base named "
        "after one, such as vit-digits, brings it and 1500 steps",
    )
    base: str | None = Field(
        default=None,
        description='the model that the arms change: a backbone such as "transformer(depth=6)", package.module:function, '
        "a saved folder, or hf:NAME; trained:BASE is trained once for each seed and shared by all arms; defaults to the task's "
        "usual one",
    )
    arms: tuple[ArmSpec, ...] = Field(
        default=(ArmSpec(name="plain", use="plain"),),
        min_length=1,
        description='the list of what is compared: "plain", a system\'s slug, "norm=rmsnorm", joined by "+"; "stream=*" is all streams',
    )
    seeds: int | str = Field(
        default="4..12",
        description="how many seeds each arm is trained with: 3, or 4..12 to stop each arm as soon as it is decided",
    )
    steps: NonNegativeInt | None = Field(
        default=None, description="training steps of each run; 0 judges the base as it is"
    )
    seconds: PositiveFloat | None = Field(
        default=None, description="training time of each run in seconds, in place of steps"
    )
    batch_size: PositiveInt = Field(default=16, description="samples in one training step")
    lr: PositiveFloat | None = Field(
        default=None, description="peak learning rate of all arms; without it each arm takes its own best of `rates`"
    )
    rates: tuple[PositiveFloat, ...] = Field(
        default=(3e-4, 1e-3, 3e-3, 1e-2), min_length=1, description="learning rates that are tried for every arm"
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="course of the learning rate after the warm-up"
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="share of the budget in which the learning rate rises to its peak"
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay of matrices")
    clip: PositiveFloat = Field(default=1.0, description="largest norm of the gradient")
    evaluations: PositiveInt = Field(default=8, description="how often a run is evaluated, the last time at its end")
    keep: bool = Field(
        default=False, description="whether the trained weights of every arm and seed are kept, in `out`/weights"
    )
    allow_equal: bool = Field(default=False, description="whether arms may equal the baseline, as in an A/A study")
    workers: PositiveInt = Field(default=1, description="runs at a time, each in a process of its own")
    threads: PositiveInt = Field(default=1, description="threads of each worker")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the models are trained")
    storage: str | None = Field(
        default=None, description="URL of the database with the records; defaults to SQLite in `out`"
    )
    export: tuple[Literal["parquet", "tensorboard"], ...] = Field(
        default=(), description="other forms of the records beside CSV: parquet, tensorboard"
    )
    out: Path | None = Field(default=None, description="folder of the records and the report; defaults to runs/TASK")

    if TYPE_CHECKING:  # what the validators below take, too

        def __init__(
            self, *, arms: str | Sequence[str | Mapping[str, str] | ArmSpec] = ..., **settings: Any
        ) -> None: ...

    @field_validator("arms", mode="before")
    @classmethod
    def _arms(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = split_top(value, ",")
        if isinstance(value, list | tuple):
            arms = [arm for v in value for arm in (_all_of(v) if isinstance(v, str) else [v])]
            return tuple({"name": v, "use": v} if isinstance(v, str) else v for v in arms)
        return value

    @field_validator("export", mode="before")
    @classmethod
    def _export(cls, value: Any) -> Any:
        return tuple(split_top(value, ",")) if isinstance(value, str) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> int | str:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", value) if isinstance(value, str) else None
        if ends is None or not 3 <= int(ends[1]) < int(ends[2]):
            raise ValueError("a number greater than 0, or a rising range from 3 or more, such as 4..12")
        return f"{int(ends[1])}..{int(ends[2])}"

    @model_validator(mode="after")
    def _whole(self) -> StudySpec:
        if self.steps is not None and self.seconds:
            raise ValueError("steps and seconds are two budgets; give one")
        names = [arm.name for arm in self.arms]
        if doubled := [n for n in names if names.count(n) > 1]:
            raise ValueError(f"two arms are called {doubled[0]!r}; give each a name of its own")
        return self

    @property
    def budget(self) -> dict[str, float]:
        """The budget as one entry, ``{"steps": n}`` or ``{"seconds": s}``."""
        return {"seconds": self.seconds} if self.seconds else {"steps": 200 if self.steps is None else self.steps}

    @property
    def baseline(self) -> str:
        """Name of the arm that the others are compared with: the untouched base, or the first."""
        return next((arm.name for arm in self.arms if arm.use == "plain"), self.arms[0].name)

    @property
    def from_text(self) -> bool:
        """Whether the text of the study is all of it, with no object of Python behind it."""
        return not any(GIVEN in text for text in (self.task, self.base or "", *(a.use for a in self.arms)))

    @property
    def folder(self) -> Path:
        """Where the records and the report go."""
        return self.out or Path("runs") / plain(shown(self.task))

    @property
    def url(self) -> str:
        """Database URL of the records."""
        return self.storage or f"sqlite:///{(self.folder / 'study.db').absolute()}"

    @property
    def identity(self) -> str:
        """Name of the study in its storage. Everything but its arms and a plain number of seeds makes it another study."""
        free = {"arms", "workers", "storage", "out", "export", "allow_equal"} | (
            set() if self.until_decided else {"seeds"}
        )
        same = json.dumps(self.model_dump(mode="json", exclude=free), sort_keys=True)
        return f"{plain(self.task)}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of seeds at which an arm that is decided stops; one number if all seeds are run."""
        if isinstance(self.seeds, int):
            return (self.seeds,)
        least, most = self.seeds.split("..")
        return looks(int(least), int(most))

    @property
    def until_decided(self) -> bool:
        """Whether arms stop as soon as they are decided."""
        return isinstance(self.seeds, str)

    @classmethod
    def default(cls) -> StudySpec:
        """The study that ``interlayer compare`` runs without options."""
        return cls(
            task="stdlib-bytes",
            base="transformer(depth=3, width=64, heads=4)",
            arms=["plain", "rezero", "denseformer", "value-residual", "muddformer"],
            rates=(1e-3, 3e-3, 1e-2),
            steps=100,
            batch_size=8,
            evaluations=4,
            workers=2,
        )

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "study", text: str = "") -> StudySpec:
        """Validate; every mistake is reported in plain words with the key, and with its line when ``text`` is the TOML."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise StudyError("\n".join(_told(e, source, text) for e in error.errors())) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> StudySpec:
        """Read a study file.

        Raises:
            StudyError: The file is missing, is not TOML, or has a key or value that means nothing here.
        """
        text, values = _read(Path(path))
        return cls.parse(values, str(path), text)

    @classmethod
    def from_values(cls, study: str | Path | None = None, values: Mapping[str, Any] | None = None) -> StudySpec:
        """A study from values of the command line or of Python, on top of a TOML file, or of the default study if there is none."""
        values = dict(values or {})
        if study is not None:
            text, base = _read(Path(study))
        else:
            text, base = "", {} if {"task", "base"} & set(values) else cls.default().model_dump(exclude_none=True)
        if "steps" in values or "seconds" in values:
            base = {k: v for k, v in base.items() if k not in ("steps", "seconds")}
        if study is None and "task" not in values and (task := _named(values.get("base"))):
            values["task"] = task
            if "seconds" not in values:
                values.setdefault("steps", TRAINED_STEPS)
        if "base" in values and "arms" not in values and study is None:
            values["arms"] = ["plain"]
        arms, given = values.get("arms"), str(values.get("base", ""))
        if isinstance(arms, str) and given.startswith("trained:") and "plain" not in split_top(arms, ","):
            values["arms"] = f"plain,{arms}"  # what is done to a trained model is judged beside that model
        return cls.parse({**base, **values}, str(study) if study is not None else "compare", text)

    def to_toml(self) -> str:
        """The study as a TOML file that reads back to itself."""
        lines = []
        for key, value in self.model_dump(mode="json", exclude_none=True, exclude={"arms"}).items():
            lines.append(f"{key} = {json.dumps(value)}")
        if all(a.name == a.use for a in self.arms):
            lines.append("arms = [" + ", ".join(json.dumps(a.use) for a in self.arms) + "]")
        else:
            for a in self.arms:
                lines += ["", "[[arms]]", f"name = {json.dumps(a.name)}", f"use = {json.dumps(a.use)}"]
        return "\n".join(lines) + "\n"


def _all_of(arm: str) -> list[str]:
    """``slot=*`` stands for every ready system that fills the slot."""
    slot, star, rest = arm.partition("=*")
    if not star or rest:
        return [arm]
    if slot not in catalog.slots():
        raise ValueError(f"no slot {slot!r}.{catalog.nearest(slot, catalog.slots())} There are {catalog.slots()}")
    return [s.slug for s in catalog.load().values() if s.slot == slot and s.state == "ready"]


def split_top(text: str, at: str) -> list[str]:
    """Split at a character, but not inside brackets or quotes.

    >>> split_top("a(b=1,c=2),d", ",")
    ['a(b=1,c=2)', 'd']
    """
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        depth += (c in "([{") - (c in ")]}")
        if c == at and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def shown(text: str) -> str:
    """A text of the records as people read it: an object's without the digest of its content.

    >>> shown("python:Net-01234567"), shown("mlp(depth=2)")
    ('Net', 'mlp(depth=2)')
    """
    return re.sub(rf"{GIVEN}([\w-]+?)-[0-9a-f]{{8}}", r"\1", text)


def plain(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        raise StudyError(f"{path}: there is no such study file.")
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not a TOML file: it is not UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise StudyError(f"{path}: not a TOML file: it is nested too deeply.") from None
    except ValueError as error:  # a syntax error, or a number too long to read
        raise StudyError(f"{path}: not a TOML file: {str(error).rstrip('.')}.") from None


def _told(error: Any, source: str, text: str) -> str:
    """One pydantic error as a sentence: where, what the key means, what was wanted, what came."""
    path = [p for p in error["loc"] if isinstance(p, str)]
    key = path[-1] if path else ""
    line = (
        next((i for i, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*{re.escape(key)}\s*=", row)), None)
        if key
        else None
    )
    where = f"{source}, line {line}" if line else source
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}."
    owner: type[BaseModel] = ArmSpec if len(path) > 1 else StudySpec
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, owner.model_fields, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" There are {', '.join(owner.model_fields)}."
        return f"{where}: no key {key!r}.{hint}"
    means = owner.model_fields[key].description if key in owner.model_fields else ""
    wanted = re.sub(
        r", (unable to parse|got a number with).*",
        "",
        message.removeprefix("Input should be ").removeprefix("a valid "),
    )
    plain = {"number": "a number", "integer": "a whole number", "string": "a text", "list": "a list", "tuple": "a list"}
    return f"{where}: {key!r} ({means}): wanted {plain.get(wanted, wanted)}, got {error['input']!r}."


def _named(base: Any) -> str:
    """The built-in task that the name of a base ends in, as that of ``trained:vit-digits`` does; empty for none."""
    name = base.rpartition(":")[2].partition("(")[0] if isinstance(base, str) else ""
    return next((task for task in catalog.tasks() if name.endswith(f"-{task}")), "")
