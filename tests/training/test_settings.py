from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.training import Settings


def test_the_defaults_leave_only_the_rate_open() -> None:
    settings = Settings()
    assert settings.learning_rate is None and settings.optimiser == "adamw"
    assert settings.rows_per_step == 16


def test_settings_round_trip_through_json() -> None:
    settings = Settings(learning_rate=3e-4, betas=(0.9, 0.95), optimiser_options={"eps": 1e-6})
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": -1.0}, "learning_rate.*greater than 0.*-1.0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "betas.1"),
        ({"accumulation": 0}, "accumulation.*greater than 0"),
        ({"precision": "fp16"}, "precision.*'fp32' or 'bf16'.*'fp16'"),
        ({"per_device_batch_size": "many"}, "per_device_batch_size.*valid integer.*'many'"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_steps or warmup_ratio, not both"),
        ({"patience": 2}, "set evaluation_every too"),
        ({"optimiser_options": {"eps": float("inf")}}, "finite"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Settings(**values)
    with pytest.raises(ValidationError, match=said):  # inside another model: pydantic's own
        Settings.model_validate(values)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'lerning_rate'.*'learning_rate'"):
        Settings(lerning_rate=0.1)  # type: ignore[call-arg]
    with pytest.raises(UnknownNameError, match=r"schedule 'liner'.*'linear'"):
        Settings(schedule="liner")


def test_settings_and_budgets_import_without_torch() -> None:
    code = (
        "import sys, deltatune.training as t; t.Settings(); t.parse('3 steps')\nprint(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "accelerate", "transformers"} & set(run.stdout.split())


def test_every_public_name_is_there() -> None:
    import deltatune.training

    for name in deltatune.training.__all__:
        assert getattr(deltatune.training, name) is not None
    with pytest.raises(AttributeError, match="'fitt'"):
        _ = deltatune.training.fitt  # type: ignore[attr-defined]
