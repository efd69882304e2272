# SPDX-License-Identifier: Apache-2.0
"""The classes with which loading begins, if the links beside this file are links.

Git on Windows and some archives write a text file instead of a link, and Python would say "invalid syntax" of it. This
is the one file of the folder that is no link. Not here: anything of the model.
"""

try:
    from .configuration_visualglm import VisualGLMConfig
    from .image_processing_visualglm import VisualGLMImageProcessor
    from .processing_visualglm import VisualGLMProcessor
except SyntaxError as error:
    if not (error.text or "").strip().endswith(".py"):
        raise
    raise ImportError(
        "The model's code is not in its folder, only the texts of links to it: git and some archives write those where "
        "links may not be made. Have it written as files: visualglm check FOLDER --copy-code, in a checkout "
        "visualglm check models/visualglm-tiny --copy-code"
    ) from error


__all__ = ["VisualGLMConfig", "VisualGLMImageProcessor", "VisualGLMProcessor"]
