"""What is the operator's to mend in the registry; a caller's mistakes are ``AdapterError``s.

::

    RegistryError
    ├── SchemaTooNew         the database was written by a newer shoal
    ├── RegistryUnavailable  database or store cannot be reached, is locked or is full; try again
    ├── RecordDamaged        an adapter's stored bytes are missing or do not match their digest
    └── KeyNotFound          no API key has this id
"""


class RegistryError(Exception):
    """Base class. The message may name paths and URLs: log it, do not show it to clients."""


class SchemaTooNew(RegistryError):
    """The database's schema version is above the one this release knows."""


class RegistryUnavailable(RegistryError):
    """The database or the store did not answer, or refused to write."""


class RecordDamaged(RegistryError):
    """The bytes of a digest are missing, or their sha256 is another, or their basis is gone."""


class KeyNotFound(RegistryError):
    """There is no API key of this id."""
