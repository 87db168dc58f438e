"""What an error of boto3 means to us. Pure: an exception in, a kind out.

S3 speaks in an HTTP status and a code, and neither alone will do: an expired token is a 400, a HEAD has no body and
so no code, and implementations differ in codes more than in statuses.
"""

from enum import Enum, auto

from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    ConnectionError,  # noqa: A004  boto3's own, which is no OSError
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    LoginError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)

_TOKEN_FILE = (FileNotFoundError, PermissionError)  # AWS_WEB_IDENTITY_TOKEN_FILE, which boto3 opens by itself
S3_ERRORS = (BotoCoreError, ClientError, RetriesExceededError, S3UploadFailedError, *_TOKEN_FILE)
"""Everything that boto3 raises about a request."""

_TRANSPORT = (ConnectionError, HTTPClientError, IncompleteReadError, ChecksumError, RetriesExceededError)
_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
    NoAuthTokenError,
    SSOError,
    LoginError,
    *_TOKEN_FILE,
)
_WRAPPERS = (S3UploadFailedError, RetriesExceededError)


class Kind(Enum):
    """Why a request did not do what was asked."""

    MISSING = auto()
    NO_BUCKET = auto()
    FORBIDDEN = auto()
    EXPIRED = auto()  # it is the credentials, which expired or were replaced: there may be newer ones
    NO_UPLOAD = auto()
    CONDITION_FAILED = auto()
    UNRESOLVED = auto()  # a conflicting request is under way
    OUT_OF_RANGE = auto()
    NOT_IMPLEMENTED = auto()
    TRANSIENT = auto()
    REFUSED = auto()  # asking again would be refused again


_BY_CODE = {
    "NoSuchBucket": Kind.NO_BUCKET,
    "NoSuchKey": Kind.MISSING,
    "NoSuchUpload": Kind.NO_UPLOAD,
    "AccessDenied": Kind.FORBIDDEN,
    "AllAccessDisabled": Kind.FORBIDDEN,
    "ExpiredToken": Kind.EXPIRED,
    "ExpiredTokenException": Kind.EXPIRED,
    "InvalidAccessKeyId": Kind.EXPIRED,  # what SeaweedFS says of an expired session
    "InvalidIdentityToken": Kind.EXPIRED,
    "InvalidToken": Kind.EXPIRED,
    "SignatureDoesNotMatch": Kind.FORBIDDEN,
    "TokenRefreshRequired": Kind.EXPIRED,
    "PreconditionFailed": Kind.CONDITION_FAILED,
    "ConditionalRequestConflict": Kind.UNRESOLVED,
    "OperationAborted": Kind.UNRESOLVED,
    "InvalidRange": Kind.OUT_OF_RANGE,
    "NotImplemented": Kind.NOT_IMPLEMENTED,
    "BadDigest": Kind.TRANSIENT,  # the bytes broke on their way
    "IDPCommunicationError": Kind.TRANSIENT,
    "IncompleteBody": Kind.TRANSIENT,
    "InternalError": Kind.TRANSIENT,
    "RequestTimeout": Kind.TRANSIENT,
    "SlowDown": Kind.TRANSIENT,
    "Throttling": Kind.TRANSIENT,
    "ThrottlingException": Kind.TRANSIENT,
    "XAmzContentSHA256Mismatch": Kind.TRANSIENT,
}
_BY_STATUS = {
    401: Kind.FORBIDDEN,
    403: Kind.FORBIDDEN,
    404: Kind.MISSING,
    408: Kind.TRANSIENT,
    409: Kind.UNRESOLVED,
    412: Kind.CONDITION_FAILED,
    416: Kind.OUT_OF_RANGE,
    429: Kind.TRANSIENT,
    501: Kind.NOT_IMPLEMENTED,
}

_NO_ENTRY = {400, 401, 403}


def classify(error: BaseException) -> Kind:
    """Return what kind of failure an exception of boto3 is."""
    inner = _cause(error)
    if isinstance(inner, ClientError):
        status = _status(inner)
        if status in _NO_ENTRY and inner.operation_name.startswith("Head"):
            return Kind.EXPIRED  # or forbidden: the answer to a HEAD has no code that would tell
        by_status = _BY_STATUS.get(status, Kind.TRANSIENT if status >= 500 else Kind.REFUSED)
        return _BY_CODE.get(_code(inner), by_status)
    if isinstance(inner, _CREDENTIALS):
        return Kind.FORBIDDEN
    return Kind.TRANSIENT if isinstance(inner, _TRANSPORT) else Kind.REFUSED


def describe(error: BaseException) -> str:
    """Return code and status, or the class of the error: never its text, which may quote keys, signatures or URLs.

    Of a token that cannot be read, where it should be.
    """
    inner = _cause(error)
    if isinstance(inner, _TOKEN_FILE):
        return f"{inner.strerror}: {inner.filename}"
    if not isinstance(inner, ClientError):
        return type(inner).__name__
    code, status = _code(inner), _status(inner)
    return f"HTTP {status}" if code in {"", str(status)} else f"{code}, HTTP {status}"


def _cause(error: BaseException) -> BaseException:
    """Return what a transfer failed of: boto3 wraps it in an error of its own that keeps only the text."""
    wrapped = (error.__cause__ or error.__context__) if isinstance(error, _WRAPPERS) else None
    return wrapped or error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
