"""``pc`` is ``pyarrow.compute`` without types.

Its functions are made when it is imported, so that a type checker finds none of them.
"""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
