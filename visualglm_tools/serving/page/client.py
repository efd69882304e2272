"""What of the page runs in the browser: `page.js` and `style.css` beside this file, and the calls of the one by events.

Not here: what the page says (`words.py`), and what the server does (`page.py`).
"""

import json
from pathlib import Path

from visualglm_tools.serving.engine.prompts import QUESTIONS
from visualglm_tools.serving.page.words import CHINESE, ENGLISH


HERE = Path(__file__).parent
TITLE = "VisualGLM-6B"
WORDS = json.dumps({"en": ENGLISH, "zh": CHINESE})
HEAD = f"""<title>{TITLE}</title>
<style>{(HERE / "style.css").read_text(encoding="utf-8")}</style>
<script>
const WORDS = {WORDS}, QUESTIONS = {json.dumps(QUESTIONS)};
{(HERE / "page.js").read_text(encoding="utf-8")}
</script>"""
EXPORTED = "visualglm.zip"

# When the page is there.
ATTEND = "() => visualglm.attend()"
RECALL = "(typed) => visualglm.recall(typed)"
SETTINGS = "(...values) => visualglm.settings(...values)"
RESUME = "() => [null, visualglm.token]"
KEEP_TOKEN = "(token) => visualglm.keepToken(token)"
KEEP_SETTINGS = "(...values) => visualglm.keepSettings(...values)"
KEEP_FIRST = "(first) => visualglm.keepFirst(first)"

# When something is asked and answered.
SEND = "(typed, sent) => visualglm.send(typed, sent)"
GIVE_BACK = "(typed, sent, unanswered) => visualglm.giveBack(typed, unanswered)"
UNSEND = "(typed, sent) => visualglm.giveBack(typed, sent)"  # the server did not take it
FINISH = "() => visualglm.finish()"

OTHER_LANGUAGE = "() => visualglm.otherLanguage()"
NAME_LANGUAGE = "() => [null, null, navigator.language]"
SAVE = f"(archive) => visualglm.save(archive, '{EXPORTED}')"
