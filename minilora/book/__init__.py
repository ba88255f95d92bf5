"""What the chapters need: where they compute, exercises that answer, source shown live."""

import os

device = os.environ.get("MINILORA_DEVICE", "cpu")  # set by `minilora book --device`
fast = bool(os.environ.get("MINILORA_FAST"))  # every cell runs, long ones shorter
