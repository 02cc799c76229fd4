"""Small pictures of an environment, where they can be made.

MuJoCo draws with MUJOCO_GL=egl or osmesa, which it reads when it is first imported; an environment
without MuJoCo may draw itself (`picture`).
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
"""Share of gymnasium's distance of a free camera, for larger pictures."""


def picture(env: Any) -> list[np.ndarray]:
    """Return one (H, W, 3) uint8 picture of the current state, or an empty list if none can be
    made.
    """
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
    """Return the model's own tracking camera, or a free one as gymnasium has it."""
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
