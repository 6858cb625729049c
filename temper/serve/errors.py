"""Errors in the form that OpenAI clients raise: `{"error": {message, type, param, code}}` with the right status."""

from __future__ import annotations

from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    410: "gone_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """One refused or failed request: its HTTP `status`, a machine-readable `code`, and the parameter at fault."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers or {}
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
