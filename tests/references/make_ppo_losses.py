"""Write ppo_losses.json: losses and gradients of tests/rl/test_ppo.py's batch by PyTorch."""

import importlib.util
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "support"))
spec = importlib.util.spec_from_file_location("test_ppo", TESTS / "rl" / "test_ppo.py")
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

if __name__ == "__main__":
    found = {name: module.torch_losses(config) for name, config in module.SETTINGS.items()}
    module.REFERENCE.write_text(json.dumps(found) + "\n")
