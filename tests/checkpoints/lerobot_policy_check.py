"""Run an exported policy by LeRobot alone: ``python lerobot_policy_check.py FOLDER ROWS RESULT``.

ROWS is an .npz file with ``states`` (T, B, O) and ``tasks`` (B,). RESULT gets ``actions`` (T, B, A)
and ``again``, those of a copy that LeRobot itself has saved, both after LeRobot's own processors.
This package is not needed.
"""

import sys
import tempfile

import numpy as np
import torch


def episode(cfg, folder, rows):
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    policy = get_policy_class(cfg.type).from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, folder)
    actions = []
    for _ in range(2):  # the second time after a reset
        policy.reset()
        actions.append([])
        for state in rows["states"]:
            batch = {"observation.state": torch.from_numpy(state), "task": rows["tasks"].tolist()}
            actions[-1].append(after(policy.select_action(before(batch))).numpy())
    assert np.array_equal(*actions)
    policy.reset()
    chunk = policy.predict_action_chunk(before(batch))
    assert chunk.shape == (len(state), cfg.chunk, len(cfg.action_mean))
    return np.array(actions[0]), policy


def main(folder, rows, result):
    sys.path.insert(0, folder)  # as `pip install FOLDER` does
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.parser import load_plugin
    from lerobot.policies.factory import make_pre_post_processors

    load_plugin("lerobot_policy_onetomany")
    rows = dict(np.load(rows))
    cfg = PreTrainedConfig.from_pretrained(folder)
    actions, policy = episode(cfg, folder, rows)
    assert not policy.training and not any(name.startswith("pipeline") for name in sys.modules)
    with tempfile.TemporaryDirectory() as copy:
        policy.save_pretrained(copy)
        for processor in make_pre_post_processors(cfg):
            processor.save_pretrained(copy)
        again, _ = episode(PreTrainedConfig.from_pretrained(copy), copy, rows)
    np.savez(result, actions=actions, again=again)


if __name__ == "__main__":
    main(*sys.argv[1:])
