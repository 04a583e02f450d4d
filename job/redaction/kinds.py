"""Decides what is a secret: by its variable's name, by a known format, or by looking random.

The formats are those that issuers document (a prefix and a length), as in secret scanners.
"""

import re
from functools import lru_cache
from urllib.parse import unquote

# Words that make a name that of a secret; abbreviations count only as whole words.
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!I[ZS])|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CONNECTION_?STRING|CONNSTR|"
    r"(API|ACCESS|ACCOUNT|PRIVATE|STORAGE|ENCRYPTION|SIGNING|SHARED)_?KEY|"
    r"(^|_)(PASS|PWD|PW|PAT|SAS|JWT|CREDS?|COOKIE|BEARER|DSN|WEBHOOK|SIGNATURE|SIG)(_|$)|"
    r"(^|_)(AUTH|AUTHORIZATION|KEYS?)$|"
    r"(DB|USER|ROOT|ADMIN|MY)PASS$"
)
# Exceptions: names with such a word that hold a location, a name or a count instead.
_NOT_SECRET_NAME = re.compile(
    r"^(OLD)?PWD$|^GOOGLE_APPLICATION_CREDENTIALS$|"
    r"_(FILE|PATH|DIR|DIRECTORY|SOCK|HELPER|ENDPOINT|HOST|PORT|TYPE|NAME|LENGTH|LIMIT|COUNT|TTL)$|"
    r"(^|_)(MAX|MIN|NEW|NUM|N|TOTAL|PER)_TOKENS?(_|$)|^TOKENS$|TOKENS_PER|"
    r"(^|_)(PUBLIC|PRIMARY|FOREIGN|SORT|PARTITION|CACHE|IMAGE|TEXT|LABEL|ROW|QUESTION|ANSWER|"
    r"AUTHORIZED|HOST|KNOWN)_KEYS?$"
)
# Names of identifiers, such as digests: their values look random but are not secret.
_IDENTIFIER = re.compile(
    r"(^|_)(ID|UUID|GUID|COMMIT|SHA\d*|REVISION|REV|REF|TAG|DIGEST|HASH|CHECKSUM|FINGERPRINT|"
    r"VERSION|BUILD|RUN|JOB|HOME|USER|LOGNAME|HOSTNAME|HOST|PWD|OLDPWD|SHELL|PATH|TMPDIR|"
    r"ADDRESS|GPG_KEY|COLORS|OUTPUT|SPEC|BUCKET|REGION)$"
)
# Names of variables whose values are harmless in a spec, by last word: locations, sizes, settings,
# questions.
_HARMLESS = re.compile(
    r"(^|_)(NAME|TITLE|URI|URL|DIR|DIRECTORY|FOLDER|FILE|PATH|PREFIX|ROOT|OUTPUTS?|INPUTS?|DATA|"
    r"DATASET|DATASETS|TRAIN|EVAL|TEST|VALIDATION|SPLIT|ROWS|MODEL|BASE|ADAPTER|CHECKPOINT|LOGS?|"
    r"CACHE|FORMAT|COLUMN|COLUMNS|INSTRUCTION|QUESTION|PROMPT|SYSTEM|LANGUAGE|TASK|EXPERIMENT|"
    r"STEPS?|EPOCHS?|SEED|RATE|LR|BATCH|SIZE|LIMIT|LENGTH|WORKERS|COUNT|RANK|R|ALPHA|DROPOUT|"
    r"OPTIM|OPTIMIZER|SCHEDULER|DTYPE|DEVICE|ACCELERATOR|ENGINE|METRICS?|COMPILE|MODE|LEVEL|"
    r"STAGE|ENV|ENVIRONMENT|REGION|ZONE|BUCKET|PLATFORM|REGISTRY)$"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

_WORDY = r"(?=[A-Za-z_-]{0,40}[0-9A-Z])"  # all lower case is an ordinary word
KNOWN_FORMAT = re.compile(
    r"-----BEGIN[A-Z ]* PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?!-----)[\s\S])*(?:-----END[A-Z ]*-----)?"
    r"|(?<![A-Za-z0-9])(?:"
    rf"hf_{_WORDY}[A-Za-z0-9]{{16,}}|api_org_[A-Za-z0-9]{{16,}}"
    rf"|sk-{_WORDY}[A-Za-z0-9_-]{{16,}}|gsk_[A-Za-z0-9]{{20,}}|r8_[A-Za-z0-9]{{20,}}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{10,}|gh[opusr]_[A-Za-z0-9]{16,}"
    r"|github_pat_[A-Za-z0-9_]{16,}|gl(?:pat|ptt|dt|rt|cbt)-[A-Za-z0-9_-]{16,}"
    r"|xox[a-z]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}"
    r"|(?<![_-])eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)*"
    r"|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}|nvapi-[A-Za-z0-9_-]{20,}|dapi[0-9a-f]{32}"
    r"|hvs\.[A-Za-z0-9_-]{20,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"
    r"|dop_v1_[0-9a-f]{32,}|wandb_v1_[A-Za-z0-9_]{20,}|AGE-SECRET-KEY-1[A-Z0-9]{30,}"
    r")"
    r"|(?<=\bsig=)[A-Za-z0-9%+/_-]{16,}={0,2}"
    r"|(?<=hooks\.slack\.com/services/)[A-Za-z0-9/]{8,}"
    r"|(?<=[Bb]earer )(?=[A-Za-z._~+/-]{0,40}[0-9A-Z])[A-Za-z0-9._~+/-]{12,}=*"
    r"|(?<=[Aa]uthorization: Basic )[A-Za-z0-9+/]{4,}={0,2}"
)
"""Matches secrets that can be recognized anywhere by their prefix."""
MARKS = (
    *("hf_", "sk-", "k_live_", "k_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    *("xox", "xapp-", "AKIA", "ASIA", "ABIA", "ACCA", "AIza", "ya29.", "eyJ", "npm_", "pypi-"),
    *("nvapi-", "dapi", "hvs.", "SG.", "dop_v1_", "r8_", "gsk_", "glpat-", "glptt-", "gldt-"),
    *("glrt-", "glcbt-", "api_org_", "wandb_v1_", "AGE-SECRET", "sig=", "slack.com", "earer "),
    *("Basic ", "-----BEGIN"),
)
"""Every match of KNOWN_FORMAT contains, or follows, one of these."""


def may_contain_known_format(text: str) -> bool:
    """Whether `text` contains one of MARKS: a fast check before matching KNOWN_FORMAT."""
    for mark in MARKS:  # noqa: SIM110 - twice as fast as any(), and called for every line
        if mark in text:
            return True
    return False


_NUMBER = re.compile(r"[-+]?[\d.,_:eE+-]*")
_ROOTED = re.compile(r"~?\.{0,2}/|~|[A-Za-z][\w+.-]*://")
_RUN = re.compile(r"[A-Za-z0-9]{16,}")
_CHUNK = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_BASE64 = re.compile(r"(?=[^a-z]*[a-z])(?=[^A-Z]*[A-Z])(?=\D*\d)[A-Za-z0-9+/]{38,}={0,2}")
_PLAIN_WORDS = frozenset(
    ("true", "false", "yes", "no", "on", "off", "none", "null", "auto", "disabled", "enabled")
)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a variable or URL parameter of this name holds a secret."""
    words = _CAMEL.sub("_", name).replace("-", "_").upper()
    whole = name.replace("-", "_").upper()
    if _NOT_SECRET_NAME.search(words) or _NOT_SECRET_NAME.search(whole):
        return False
    return bool(_SECRET_NAME.search(words) or _SECRET_NAME.search(whole))


@lru_cache(maxsize=4096)
def is_secret_parameter(name: str) -> bool:
    """Whether a URL query parameter of this name is a secret, as in signed URLs."""
    name = unquote(name)
    if re.match(r"X-(Amz|Goog|OSS)-", name, re.I):
        return True
    return is_secret_name(name) or name.lower() in ("pwd", "auth", "session", "code")


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's value is a secret: by its name, by a known format, or by looking random.

    Numbers, words, sentences, paths, URIs and identifiers (a commit, a run) are secrets only if the
    name says so. `urls` finds secrets within URIs.
    """
    if value.strip().lower() in _PLAIN_WORDS:
        return False
    if is_secret_name(name):
        return True
    if "://" not in value and KNOWN_FORMAT.search(value):
        return True
    return not _IDENTIFIER.search(_CAMEL.sub("_", name).upper()) and looks_random(value)


def is_secret_in_spec(name: str, value: str) -> bool:
    """Whether the value of a variable that a spec uses is a secret.

    Stricter than `is_secret`: any value is, unless the name is known to be harmless or the value is
    a number, a path or a URI. `urls` finds secrets within URIs.
    """
    if is_secret(name, value):
        return True
    words = _CAMEL.sub("_", name).replace("-", "_").upper()
    if _HARMLESS.search(words) or _IDENTIFIER.search(words):
        return False
    value = value.strip()
    plain = not value or _NUMBER.fullmatch(value) or value.lower() in _PLAIN_WORDS
    return not (plain or _ROOTED.match(value))


def looks_random(value: str) -> bool:
    """Whether a value contains a long random-looking mixture of letters and digits.

    Hexadecimal and lower-case file names are common, so in an absolute path or URI only a mixture
    of upper case, lower case and digits counts.
    """
    value = value.strip()
    if len(value) < 16 or _NUMBER.fullmatch(value):
        return False
    rooted = bool(_ROOTED.match(value))
    if not rooted and _BASE64.fullmatch(value):
        return True
    return any(_is_mixture(run, cased=rooted) for run in _RUN.findall(value))


def _is_mixture(run: str, *, cased: bool) -> bool:
    digits, letters = any(c.isdigit() for c in run), any(c.isalpha() for c in run)
    both_cases = run.lower() != run != run.upper()
    if not letters or (cased and not (digits and both_cases)):
        return False
    # Words and numbers are long runs of one kind; random text changes kind all the time.
    piece = len(run) / len(_CHUNK.findall(run))
    if digits:
        limit = 2.6 if len(run) < 20 else 4.0 if len(run) < 32 else 8.0
        return piece <= limit
    return both_cases and len(run) >= 20 and piece <= 3.2
