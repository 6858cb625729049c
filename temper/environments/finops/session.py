"""One session at the desk: the tools of a company over a private copy of its ledger."""

from __future__ import annotations

from types import TracebackType

from temper.core.records import ToolCall
from temper.environments.finops.tools import SPECS, ToolFault, bind, ledger_balance
from temper.environments.finops.world import Company
from temper.rollout.tools import Tool, Toolbox


class LedgerSession:
    """Single use: opened for one episode, closed after it is verified."""

    def __init__(self, company: Company, offered: tuple[str, ...] | None = None) -> None:
        self.company = company
        self.ledger = company.ledger()
        functions = bind(company, self.ledger)
        names = functions if offered is None else offered
        self.toolbox = Toolbox([Tool(SPECS[name], functions[name]) for name in names], expected=(ToolFault,))

    def __enter__(self) -> LedgerSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def call(self, call: ToolCall) -> str:
        """The tool's result as JSON text; a refused call is `{"error": …}`, which is data."""
        return self.toolbox.call(call)

    def entries(self) -> list[tuple[dict[str, int], dict[str, int]]]:
        """Debits and credits of every entry that the assistant posted, in order."""
        found = []
        for (entry,) in self.ledger.execute("SELECT id FROM entry WHERE posted_by = 'assistant' ORDER BY id").fetchall():
            lines = self.ledger.execute("SELECT account, debit, credit FROM posting WHERE entry = ?", (entry,)).fetchall()
            found.append(({name: d for name, d, _ in lines if d}, {name: c for name, _, c in lines if c}))
        return found

    def difference(self, account: str) -> int:
        """Bank less ledger balance of a cash account, USD."""
        bank = self.ledger.execute("SELECT balance FROM bank WHERE account = ?", (account,)).fetchone()[0]
        return bank - ledger_balance(self.ledger, account)

    def close(self) -> None:
        """Give the private ledger back."""
        self.ledger.close()
