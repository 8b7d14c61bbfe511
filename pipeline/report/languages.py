"""What languages call themselves, by the codes that data sets use: `amh_Ethi`, `am`, `amh`.

A code that is not here is left to the browser, which knows some of the others.
"""

from pipeline.examples import LANGUAGE_COLUMNS
from pipeline.report.markup import Html, element, text_in_own_direction

# ISO 639-3, ISO 639-1 or a hyphen, own name.
_NAMES = """
afr af Afrikaans
amh am አማርኛ
arb ar العربية
ara ar العربية
asm as অসমীয়া
azj az azərbaycan
bel be беларуская
ben bn বাংলা
bod bo བོད་སྐད་
bos bs bosanski
bul bg български
cat ca català
ces cs čeština
ckb - کوردیی ناوەندی
cym cy Cymraeg
dan da dansk
deu de Deutsch
div dv ދިވެހި
ell el Ελληνικά
eng en English
est et eesti
eus eu euskara
fas fa فارسی
fin fi suomi
fra fr français
gle ga Gaeilge
glg gl galego
guj gu ગુજરાતી
hau ha Hausa
heb he עברית
hin hi हिन्दी
hrv hr hrvatski
hun hu magyar
hye hy հայերեն
ibo ig Igbo
ind id Indonesia
isl is íslenska
ita it italiano
jpn ja 日本語
kan kn ಕನ್ನಡ
kat ka ქართული
kaz kk қазақ тілі
khm km ខ្មែរ
kin rw Ikinyarwanda
kir ky кыргызча
kor ko 한국어
lao lo ລາວ
lit lt lietuvių
lvs lv latviešu
mal ml മലയാളം
mar mr मराठी
mkd mk македонски
mlt mt Malti
mya my မြန်မာ
nld nl Nederlands
npi ne नेपाली
nep ne नेपाली
ory or ଓଡ଼ିଆ
pan pa ਪੰਜਾਬੀ
pbt ps پښتو
pes fa فارسی
pol pl polski
por pt português
quy qu Runasimi
ron ro română
rus ru русский
sin si සිංහල
slk sk slovenčina
slv sl slovenščina
sna sn chiShona
snd sd سنڌي
som so Soomaali
spa es español
sqi sq shqip
srp sr српски
swe sv svenska
swh sw Kiswahili
tam ta தமிழ்
tat tt татарча
tel te తెలుగు
tgk tg тоҷикӣ
tgl tl Tagalog
tha th ไทย
tir ti ትግርኛ
tur tr Türkçe
uig ug ئۇيغۇرچە
ukr uk українська
urd ur اردو
uzn uz oʻzbekcha
vie vi Tiếng Việt
wol wo Wolof
xho xh isiXhosa
ydd yi ייִדיש
yor yo Yorùbá
yue - 粵語
zho zh 中文
zul zu isiZulu
"""


def _parse(names: str) -> dict[str, tuple[str, str]]:
    """Any code of a language -> its tag of BCP 47 and its own name."""
    tags: dict[str, tuple[str, str]] = {}
    for line in names.strip().splitlines():
        long, short, name = line.split(" ", 2)
        tag = long if short == "-" else short
        tags[long] = tags[tag] = (tag, name)
    return tags


_TAGS = _parse(_NAMES)


def find_tag(code: str) -> str | None:
    """The tag of BCP 47 of a language, by which a browser chooses fonts; None if unknown here."""
    language, _, script = code.replace("-", "_").partition("_")
    if language.lower() not in _TAGS:
        return None
    tag, _ = _TAGS[language.lower()]
    return f"{tag}-{script}" if script.istitle() and len(script) == 4 else tag


def own_name(code: str) -> Html | None:
    """A language's own name in its own script and direction, None where it is not known here."""
    tag = find_tag(code)
    if tag is None:
        return None
    _, name = _TAGS[code.replace("-", "_").partition("_")[0].lower()]
    return element("bdi", name, class_="own-name", lang=tag, dir="auto")


def slice_heading(column: str, value: str) -> Html:
    """The heading of a row about a value of a column; a language has its own name there."""
    text = text_in_own_direction(value)
    if column not in LANGUAGE_COLUMNS:
        return element("th", text, scope="row")
    return element("th", text, own_name(value) or "", scope="row", data_language=value)
