"""All hostile inputs."""

from __future__ import annotations

import config_cases
import devkit_cases
import http_cases
import image_cases
import layout_cases
import manifest_cases
import record_cases
import s3_cases
import ssh_cases
import tar_cases

_MODULES = (
    *(tar_cases, devkit_cases, image_cases, http_cases, s3_cases, ssh_cases),
    *(config_cases, record_cases, manifest_cases, layout_cases),
)
CASES = [case for module in _MODULES for case in module.CASES]
