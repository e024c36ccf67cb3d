from __future__ import annotations

from types import ModuleType

import ptq_tdq.calib_data as calib_data


def test_the_public_names_are_exactly_those_exported() -> None:
    public = {
        name
        for name, value in vars(calib_data).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert public == set(calib_data.__all__)


def test_every_public_class_and_function_is_documented() -> None:
    for name in calib_data.__all__:
        value = getattr(calib_data, name)
        if callable(value) and getattr(value, "__module__", "").startswith("ptq_tdq"):
            assert value.__doc__, name
