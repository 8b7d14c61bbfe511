"""What an error of a store means: that it has decided, or that it may be asked again.

error of a client -- find_status, is_final --> asked again, or a StoreError
"""

from pipeline.errors import StoreError

_FINAL = (
    *(FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(AttributeError, ImportError, MemoryError, NotImplementedError, TypeError, ValueError),
)
# Of botocore, which is not imported for the sake of other stores.
_FINAL_NAMES = {"NoCredentialsError", "ParamValidationError", "PartialCredentialsError"}
_NOT_FOUND = 404
BEYOND = 416  # a range that begins behind the end of the object
_PASSING_STATUS = {408, 409, 412, 425, 429}  # 412: another commit to a repository came before
_PASSING_CODES = {
    *("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"),
    "NoSuchUpload",  # whose end was answered, but the answer lost
}


def is_final(error: BaseException) -> bool:
    """Whether the store has decided, so that asking again would be of no use."""
    status, code = find_status(error)
    if code in _PASSING_CODES:
        return False
    if isinstance(error, (*_FINAL, StoreError)) or type(error).__name__ in _FINAL_NAMES:
        return True
    return 400 <= status < 500 and status not in _PASSING_STATUS


def is_missing(error: BaseException) -> bool:
    """Whether the store says that an object, or what should hold it, is not there."""
    return isinstance(error, FileNotFoundError) or find_status(error)[0] == _NOT_FOUND


def find_status(error: BaseException) -> tuple[int, str]:
    """HTTP status and code of an answer, (0, "") where there was none: botocore's, gcsfs', Azure's,
    the hub's."""
    for known in (error, error.__cause__):
        response = getattr(known, "response", None)
        if isinstance(response, dict):
            meta = response.get("ResponseMetadata", {})
            code = str(response.get("Error", {}).get("Code", ""))
            return int(meta.get("HTTPStatusCode", 0)), code
        for status in (getattr(response, "status_code", None), getattr(known, "status_code", None)):
            if isinstance(status, int):
                return status, ""
        # aiohttp gives a body that was cut off a code of 400 of its own.
        status = getattr(known, "code", None)
        if isinstance(status, int) and type(known).__module__.startswith("gcsfs"):
            return status, ""
    return 0, ""


def name_refusal(url: str, done: str, error: Exception) -> StoreError:
    """What the store has decided, in one line that says what to do."""
    if isinstance(error, StoreError):
        return error
    remedy = "check the address and the settings of the store"
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        remedy = "check the credentials and what they allow"
    return StoreError(f"{url}: cannot be {done} ({say_once(error)}); {remedy}")


def say_once(error: Exception) -> str:
    """The words of an error in one line, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
