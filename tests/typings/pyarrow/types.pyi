"""Questions about types of columns: is_list(kind), is_string(kind), ..."""

from typing import Protocol

from pyarrow import DataType

class Question(Protocol):
    def __call__(self, t: DataType) -> bool: ...

def __getattr__(name: str) -> Question: ...
