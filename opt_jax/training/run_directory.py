"""The run directory. One start of a run at a time may write to it, and it must not differ from the first one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath

from opt_jax.data.tokenizers import save_tokenizer
from opt_jax.parallel import agreement
from opt_jax.parallel.agreement import on_first_process
from opt_jax.text.tokenizer import OPTTokenizer
from opt_jax.training.files import begin_run, check_run_directory, run_directory, write_record
from opt_jax.training.option_checks import compare_with_first_start
from opt_jax.training.run_lock import RunLock

Record = dict[str, dict[str, Any]]  # section -> name -> value, as in run.json


@contextmanager
def open_run(name: str, record: Record) -> Iterator["RunDirectory"]:
    """A context with the run directory, which holds the run's lock until the block ends.

    Args:
      record: see `RunDirectory`; the same on all processes.

    Raises:
      ValueError: the first start of the run had another record.
      FileExistsError: another process is writing to the directory, or it is not a run's.
    """
    path = run_directory(name)
    agreement.check_same(record)
    with RunLock(path) as lock:  # process 0 takes it
        yield RunDirectory(path, record, lock)


class RunDirectory:
    """What a start finds in the run directory, and what it writes there first. Nothing is written before `begin`.

    Attributes:
      path: the directory.
      record: what must be equal in all starts of a run.
      resuming: true if an earlier start has written its record.
      finished: true if an earlier start has also written the model.
    """

    def __init__(self, path: epath.Path, record: Record, lock: RunLock):
        self.path, self.record, self._lock = path, record, lock
        self._content: list[bool] = json.loads(agreement.from_first(lambda: json.dumps(self._look()).encode()))
        self.resuming, self.finished = self._content[0], all(self._content)
        self.compare({})

    def _look(self) -> list[bool]:
        """Whether an earlier start has written the record, and the model."""
        check_run_directory(self.path)
        if not (self.path / "model/config.json").exists():
            self._lock.take(create=False)
        return [(self.path / name).exists() for name in ("run.json", "model/config.json")]

    def compare(self, sections: Record) -> None:
        """Add sections to the record.

        Raises:
          ValueError: the record is not the one of the first start.
        """
        self.record |= sections
        compare_with_first_start(self.path / "run.json", self.record)

    def begin(self, tokenizer: OPTTokenizer) -> None:
        """Take the lock, create the directory and, for the first start, save the tokenizer there.

        Raises:
          FileExistsError: another start has written the directory in the meantime.
        """

        def write() -> None:
            self._lock.take()
            if self._look() != self._content:
                raise FileExistsError(f"{self.path} was written by another start in the meantime: start this one again")
            begin_run(self.path)
            if not self.resuming:
                save_tokenizer(tokenizer, self.path / "tokenizer")

        on_first_process(write)

    def check_lock(self) -> None:
        """Call this on process 0 before each write; see `RunLock.check`."""
        self._lock.check()

    def write_record(self) -> None:
        """Write the record, which makes the directory a run's, and check that all processes see it.

        Raises:
          OSError: the file cannot be written, or a process does not see it.
        """
        if jax.process_index() == 0:
            write_record(self.path, self.record)
        agreement.check_shared(self.path / "run.json")
