"""Tell which settings have changed since a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ds_kd.models.files.model_files import EARLIER_FILES, FILES

LABELS = " labels"  # the end of a name in a fingerprint, as `FILES` is
_LAYOUT = {
    "distributed.dp_size", "distributed.tp_size", "distributed.cp_size",
    "distributed.sequence_parallel", "teacher_distributed.tp_size",
}  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """A line for each setting that differs from a checkpoint's, by name.

    Args:
        fingerprint: those that decide the weights of each step.
        validation: those that decide the validation loss of given weights.
    """

    fingerprint: dict[str, str] = field(default_factory=dict)
    validation: dict[str, str] = field(default_factory=dict)


@dataclass
class Settings:
    """The settings of a run that a checkpoint keeps, as plain values by name.

    Args:
        fingerprint: those that decide the weights of each step.
        validation: those that decide the validation loss of given weights.
        defaults: the values of settings that neither names.
    """

    fingerprint: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def compare(self, saved: dict[str, Any]) -> Changes:
        """Return the changes since the checkpoint whose state.json holds `saved`."""
        before = saved.get("fingerprint", {})
        # Earlier versions did not save what decides validation.
        validated = saved.get("validation", self.validation)
        return Changes(
            differences(before, self.fingerprint, self.defaults),
            differences(validated, self.validation, self.defaults),
        )


def differences(
    saved: dict[str, Any], present: dict[str, Any], defaults: dict[str, Any] | None = None
) -> dict[str, str]:
    """Return a line for each difference between two fingerprints, by name.

    Earlier versions saved no identity of labels, and another one of models' files, or none; its
    absence is no difference. Nor is another layout of the ranks.

    Args:
        defaults: the values of settings that a fingerprint does not name, by name.
    """
    given = saved.keys() | present.keys()
    unsaid = {name: value for name, value in (defaults or {}).items() if name in given}
    saved, present = unsaid | saved, unsaid | present
    unknown = {name for name in present.keys() - saved.keys() if name.endswith((FILES, LABELS))}
    unknown |= {name for name in saved.keys() - present.keys() if name.endswith(EARLIER_FILES)}
    unknown |= _LAYOUT
    return {
        name: f"{name} was {saved.get(name)!r} and is {present.get(name)!r}"
        for name in sorted((saved.keys() | present.keys()) - unknown)
        if saved.get(name) != present.get(name)
    }
