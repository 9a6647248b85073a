# SPDX-License-Identifier: Apache-2.0
"""Latte's nodes for ComfyUI: copy or link this folder into ComfyUI/custom_nodes, in a Python with latte."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
