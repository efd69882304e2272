"""Bodies of requests that cost a server much for nothing, unless it bounds them; and what it answers."""

import base64
import json
import zlib

from tests.picture_files import png_of_zeros
from tests.serving_helpers import MODEL, data_uri, nested_schema


MIB = 2**20
JSON = {"Content-Type": "application/json"}
CHAT, LEGACY = "/v1/chat/completions", "/"
COMPLETIONS, RESPONSES, TOKENIZE = "/v1/completions", "/v1/responses", "/tokenize"
# 8192 x 8192 pixels each, deflated: in one process decoding takes up to 16 s and 1.5 GB.
JPEG_2000 = """
c-muNVBpCLP*C9IYUg5LU=T?wsVvAUFj4@r8KAT-kj?<oVwo8!MGOoeAs}XEX9uZa;7`uaDPjaO1sE8Z{s0vx|M&kN$e_=_09OnLXnbaNMn(wwAH=`|6ku
dvWnp1p{2#+0?BL+x5rB;Tr!c58Fgh2dCYGe8C?r)X_!p$+c?Gz-E0m=c6=&w>DH!RQ>Y4nXzyR_I15+u`oXOvRu+}rI2NMrO|1j-u2>-zK-$5HFa6lVLG
(a#QWc~m8mz@dqgOfGtkHN)iKn4GA0s!t~WyA"""
AVIF = """
c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xy^nKdYzkElE?r7iWw<6MNl?FL1uCZ0~+8f$SlbPvlxL`E;A=T8N_h`@fjhajKT~I%)CIhMrLMS8eFXukdw
*;<t3IG7&_<Y<b&<X$}A`<0Mg!>1<Cn9S|qc$AQfVr0u(a{6l7Lpf*8yk92`K3C$Y@Xxlx`6BqW@ipHq~VoKpcbnU{gB0VpJ%S&$3!6VPESj7-feK)s^5D
TyUQ3|!pupY8wu|JK2gVWMF4n^nT)czata6Nkb)N1*zs^XCHBYCe&=bu>XS-r&uOGX<JwCoI(T`mf2x*RseetN8-Q184J80qv%UbDPheKJ{&e?FVfKBeQv
LFBi|@@h`GibLU~5;q*f(ucsvO1+7;982h2cO#B?%+IVq=nDgf%%9%btuM2UXaoy44?zM#*wX9p0f820?VQktggQkCR&sk&NY_xhdBRu<_P6Eg0IfsPh+F
r}Px6^gme_hqGm&5nK@!M(1`Yk7~YaEeT8s`6K_d|{x{W-i*`}7<}O&^Y?)6{SP3E{10"""


def json_bytes(**fields) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def chat_body(content, **fields) -> bytes:
    return json_bytes(model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=1, **fields)


def schema_body(schema: dict) -> bytes:
    return chat_body("a", response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def uri_body(uri: str) -> bytes:
    return chat_body([{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "?"}])


def unpacked(text: str) -> str:
    return "data:;base64," + base64.b64encode(zlib.decompress(base64.b85decode(text.replace("\n", "")))).decode()


MANY = 500_000
HOSTILE = {
    "messages of nothing": (CHAT, lambda: json_bytes(model="m", messages=[{}] * MANY), 413),
    "fewer messages": (CHAT, lambda: json_bytes(model="m", messages=[{}] * 40_000), 422),
    "messages of one word": (
        CHAT,
        lambda: json_bytes(model=MODEL, messages=[{"role": "user", "content": "a"}] * 40_000),
        422,
    ),
    "parts of nothing": (CHAT, lambda: chat_body([{}] * MANY), 413),
    "parts of one word": (CHAT, lambda: chat_body([{"type": "text", "text": "a"}] * 2000), (200, 400)),
    "many pictures": (CHAT, lambda: chat_body([{"type": "image_url", "image_url": {"url": "data:,"}}] * 2000), 400),
    "history of nothing": (LEGACY, lambda: json_bytes(text="a", history=[[]] * MANY), 413),
    "history of words": (LEGACY, lambda: json_bytes(text="a", history=[["b", "c"]] * 40_000), 422),
    "stops": (CHAT, lambda: chat_body("a", stop=["a"] * 100_000), 422),
    "fields": (CHAT, lambda: json_bytes(**{f"x{index}": 1 for index in range(100_000)}), 422),
    "metadata": (CHAT, lambda: chat_body("a", metadata={str(index): [] for index in range(50_000)}), 422),
    "a long text": (CHAT, lambda: chat_body("好" * 5_000_000), 400),
    "a long text of blanks": (LEGACY, lambda: json_bytes(text=" a" * 2_500_000), 400),
    "many long texts": (
        CHAT,
        lambda: json_bytes(model=MODEL, messages=[{"role": "user", "content": "a" * 5000}] * 1000, max_tokens=1),
        400,
    ),
    "a text that may just fit": (CHAT, lambda: chat_body(" " * 150_000 + "a"), (200, 400)),
    "a text of marks": (LEGACY, lambda: json_bytes(text="[gMASK]<sop>" * 13_000), 400),
    "a long name": (CHAT, lambda: json_bytes(model="m" * 20 * MIB, messages=[{"role": "user", "content": "a"}]), 404),
    "a long field": (CHAT, lambda: chat_body("a", **{"x" * 20 * MIB: 1}), 200),
    "brackets": (CHAT, lambda: b"[" * 16 * MIB, 413),
    "fewer brackets": (LEGACY, lambda: b"[" * 100_000, 400),
    "digits": (LEGACY, lambda: b'{"text": "a", "top_k": ' + b"9" * 5 * MIB + b"}", 400),
    "escapes": (LEGACY, lambda: b'{"text": "' + b"\\u4e00" * 3 * MIB + b'"}', 400),
    "percent signs": (CHAT, lambda: uri_body("data:," + "%" * 18 * MIB), (400, 413)),
    "percent escapes": (CHAT, lambda: uri_body("data:," + "%41" * 6 * MIB), (400, 413)),
    "base64 of nothing": (CHAT, lambda: uri_body("data:;base64," + "A" * 26 * MIB), 400),
    "blanks for base64": (LEGACY, lambda: json_bytes(text="a", image=" " * 26 * MIB), 400),
    "a JPEG 2000": (CHAT, lambda: uri_body(unpacked(JPEG_2000)), 400),
    "an AVIF": (CHAT, lambda: uri_body(unpacked(AVIF)), 400),
    "a PNG of 16 bits": (CHAT, lambda: uri_body(data_uri(png_of_zeros(8192, 8192, 16, 0))), 200),
    "prompts": (COMPLETIONS, lambda: json_bytes(model=MODEL, prompt=["a"] * 40_000), 422),
    "long prompts": (COMPLETIONS, lambda: json_bytes(model=MODEL, prompt=["a " * 20_000] * 60), 400),
    "a long prompt": (COMPLETIONS, lambda: json_bytes(model=MODEL, prompt="好" * 5_000_000), 400),
    "input of nothing": (RESPONSES, lambda: json_bytes(model=MODEL, input=[{}] * 40_000), 422),
    "many input pictures": (
        RESPONSES,
        lambda: json_bytes(
            model=MODEL,
            input=[{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}] * 2000}],
        ),
        400,
    ),
    "long instructions": (RESPONSES, lambda: json_bytes(model=MODEL, input="a", instructions="a " * 2_000_000), 400),
    "a text to tokenize": (TOKENIZE, lambda: json_bytes(prompt="好" * 5_000_000), 400),
    "a text to count": (TOKENIZE, lambda: json_bytes(prompt=" " * 150_000 + "a"), (200, 400)),
    "biases": (CHAT, lambda: chat_body("a", logit_bias={str(index): 1 for index in range(50_000)}), 422),
    "biases of long texts": (CHAT, lambda: chat_body("a", logit_bias={"x" * 20 * MIB: 1}), 400),
    "a large schema": (CHAT, lambda: schema_body({"enum": ["x" * 10 * MIB]}), 422),
    "a deep schema": (CHAT, lambda: schema_body(nested_schema(400)), 422),
    "a schema of many values": (CHAT, lambda: schema_body({"enum": list(range(100_000))}), 422),
    "a schema of patterns": (
        CHAT,
        lambda: schema_body({"allOf": [{"pattern": f".*a.{{{20 + index}}}b"} for index in range(8)]}),
        (200, 422),
    ),
    "a schema of remainders": (CHAT, lambda: schema_body({"type": "integer", "multipleOf": 9973}), 200),
    "a schema of repeats": (
        CHAT,
        lambda: schema_body({"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**8}}),
        (200, 422),
    ),
    "a PNG with alpha": (
        LEGACY,
        lambda: json_bytes(text="a", image=data_uri(png_of_zeros(8192, 8192, 8, 6)), max_length=60),
        200,
    ),
}
