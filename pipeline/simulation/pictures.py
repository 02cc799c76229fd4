"""Small pictures of what happens in an environment, where they can be made: MuJoCo's through
MUJOCO_GL=egl or osmesa, which MuJoCo reads when it is first imported; an environment without MuJoCo
may draw itself (`picture`).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pipeline.simulation.environment import simulator

SIZE = 96, 128
"""Height and width in pixels."""
HEADLESS = ("egl", "osmesa")
CLOSER = 0.6
"""Share of gymnasium's distance of a free camera: its pictures are larger."""


def picture(env: Any) -> list[np.ndarray]:
    """One (H, W, 3) uint8 picture of now; none where none can be made, without a word."""
    plain = env.unwrapped
    if hasattr(plain, "picture"):
        return [plain.picture(*SIZE)]
    if (
        os.environ.get("MUJOCO_GL") not in HEADLESS
        or getattr(plain, "model", None) is None
        or getattr(plain, "_no_pictures", False)
    ):
        return []
    try:
        renderer = simulator().Renderer(plain.model, *SIZE)
        try:
            renderer.update_scene(plain.data, _camera(plain))
            return [renderer.render().copy()]
        finally:
            renderer.close()
    except Exception:
        # whatever a missing driver raises: ImportError, AttributeError, mujoco.FatalError, OpenGL's
        # own
        plain._no_pictures = True
        return []


def _camera(plain: Any) -> Any:
    """The model's own tracking camera, or a free one where gymnasium has it."""
    mujoco = simulator()
    if mujoco.mj_name2id(plain.model, mujoco.mjtObj.mjOBJ_CAMERA, "track") >= 0:
        return "track"
    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(plain.model, camera)
    for name, value in (
        getattr(getattr(plain, "mujoco_renderer", None), "default_cam_config", None) or {}
    ).items():
        if name == "lookat":
            camera.lookat[:] = value
        else:
            setattr(camera, name, value)
    camera.distance *= CLOSER
    return camera
