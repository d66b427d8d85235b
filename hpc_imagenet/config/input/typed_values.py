"""Fill a schema with plain values by OmegaConf, which checks names and types.

schema.py imports this module where it is used: commands such as `jobs` do not need OmegaConf.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from hpc_imagenet.errors import UserError


def typed_values(schema: type, *layers: dict[str, Any]) -> Any:
    """Return an instance of `schema` with the values of the layers, of which later ones have precedence.

    Raises:
        UserError: names the setting that is unknown, missing or of the wrong type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except OmegaConfBaseException as error:
        raise UserError(explain_omegaconf_error(error)) from None


def explain_omegaconf_error(error: OmegaConfBaseException) -> str:
    """Return an OmegaConf error as one line that starts with the setting's name."""
    setting = error.full_key or "config"
    if isinstance(error, ConfigKeyError):
        return f"{setting} is an unknown setting"
    if "missing mandatory value" in str(error).lower():
        return f"{setting} is not set: add {setting}=VALUE"
    if "is not Optional" in str(error) or "Incompatible value 'None'" in str(error):
        return f"{setting} is null: remove it, or give it a value"
    return f"{setting}: {str(error).splitlines()[0]}"
