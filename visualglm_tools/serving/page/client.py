"""The page as the browser has it: its texts in two languages, its layout, and the little that it does by itself."""

import gradio as gr

from visualglm_tools.serving.engine.prompts import QUESTIONS


TEXTS = gr.I18n(
    en={
        "notes": "Choose a picture, and it is described at once; then ask on. A new picture begins a new conversation. "
        "The model usually sees 224×224 pixels, reads no Chinese text in pictures, and invents in long descriptions. "
        "Large pictures take time to upload; if the connection fails, try without a proxy.",
        "picture": "Picture",
        "first_question": "First question",
        "chat": "Conversation",
        "question": "Your question",
        "submit": "Submit",
        "stop": "Stop",
        "retry": "Retry",
        "clear": "Clear History",
        "max_length": "Maximum length",
        "top_p": "Top P",
        "temperature": "Temperature",
        "read_text": "Read the text in the picture",
        "zoom": "Zoom in: answer from the part of the picture that matters",
        "show_look": "Show where the model looked",
        "examples": "Examples",
    },
    zh={
        "notes": "选择一张图片，模型会立即描述它，然后可以继续提问；换一张图片即开始新的对话。"
        "模型通常只能看到224×224像素，不能识别图中的中文文字，较长的描述可能包含虚构的内容。"
        "较大的图片上传需要时间；如果连接出错，请关闭代理后再试。",
        "picture": "图片",
        "first_question": "首个问题",
        "chat": "对话",
        "question": "输入问题",
        "submit": "提交",
        "stop": "停止",
        "retry": "重新回答",
        "clear": "清空对话",
        "max_length": "最大长度",
        "top_p": "Top P",
        "temperature": "温度",
        "read_text": "识别图片中的文字",
        "zoom": "放大：根据图片中与问题相关的部分回答",
        "show_look": "显示模型看了哪里",
        "examples": "示例",
    },
)

# On a wide screen the talk is beside the rest; on a phone's it comes after a low picture, so that both are in sight.
STYLE = """
#page { display: grid; grid-template: "notes notes" auto "picture talk" auto "settings talk" 1fr / 1fr 2fr; }
#look img { max-width: 100%; }
#notes { grid-area: notes } #picture { grid-area: picture } #talk { grid-area: talk } #settings { grid-area: settings }
@media (max-width: 767px) {
    #page { grid-template: "picture" auto "talk" auto "settings" auto "notes" auto / 1fr; }
    #picture { height: 22vh !important; }
    #chat { height: 36vh !important; }
    #buttons button { padding-inline: 4px; font-size: 0.8rem; }
}
"""

# If a browser does not say its language, the original's question.
CHOOSE_FIRST_QUESTION = "() => /^zh/i.test(navigator.language || 'zh') ? '{}' : '{}'".format(*QUESTIONS)

# Screen readers say the name of a picture's file; gradio gives pictures no name, nor the examples' buttons.
NAME_PICTURES = """() => {
    const nameAll = () => {
        for (const picture of document.querySelectorAll("#picture img, .gallery-item img")) {
            const [, name] = /([^/]*?)(\\.\\w+)?$/.exec(decodeURIComponent(picture.src));
            picture.alt = name.replaceAll("_", " ");
        }
    };
    const changes = {childList: true, subtree: true, attributes: true, attributeFilter: ["src"]};
    new MutationObserver(nameAll).observe(document.querySelector("#page"), changes);
    nameAll();
}"""

# A question leaves its box at once, without the server, so that what is typed next is not taken for a part of it; but
# not while another one is on its way. What was not answered comes back, in front of what has been typed meanwhile.
SEND = "(typed, sent) => sent ? [typed, sent] : typed.trim() ? ['', typed] : [typed, '']"
GIVE_BACK = "(typed, sent, unanswered) => [[unanswered, typed].filter(Boolean).join('\\n'), '', '']"
UNSEND = "(typed, sent) => [[sent, typed].filter(Boolean).join('\\n'), '', '']"  # the server did not take it
