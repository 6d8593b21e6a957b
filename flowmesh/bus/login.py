"""A login whose password lies in a file: read for each new connection, so that it may change while the node runs."""

from __future__ import annotations

import asyncio

from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError

from flowmesh.errors import ConfigError
from flowmesh.settings.secret_files import read_secret


class FileLogin(CredentialProvider):
    """
    Args:
        path: `redis.password_file`.
        username: None: Redis' default user.
    """

    def __init__(self, path: str, username: str | None) -> None:
        self._path = path
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Called for each connection.

        Raises:
            AuthenticationError: the file cannot be read; the next try may succeed.
        """
        try:
            password = read_secret(self._path, "redis.password_file")
        except ConfigError as error:
            raise AuthenticationError(str(error)) from error
        return (password,) if self._username is None else (self._username, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return await asyncio.to_thread(self.get_credentials)
