"""What the page says, in its two languages.

Not here: which of them a browser gets (`page.js`), and what is said of errors, which is the same for all doors.
"""

import gradio as gr


ENGLISH = {
    "notes": "Choose a picture, and it is described at once; then ask on. A new picture begins a new conversation. "
    "The model usually sees 224×224 pixels, reads no Chinese text in pictures, and invents in long descriptions. "
    "Large pictures take time to upload; if the connection fails, try without a proxy.",
    "other_language": "中文",
    "picture": "Picture",
    "first_question": "First question",
    "chat": "Conversation",
    "question": "Your question",
    "edit": "The question to ask instead",
    "submit": "Submit",
    "stop": "Stop",
    "retry": "Retry",
    "clear": "Clear History",
    "export": "Export",
    "copied": "Copied.",
    "max_length": "Maximum length",
    "top_p": "Top P",
    "temperature": "Temperature",
    "read_text": "Read the text in the picture",
    "zoom": "Zoom in: answer from the part of the picture that matters",
    "show_look": "Show where the model looked",
    "examples": "Examples",
    "asked": "Question",
    "answered": "Answer",
    "look": "Where the model looked for the last answer",
}
CHINESE = {
    "notes": "选择一张图片，模型会立即描述它，然后可以继续提问；换一张图片即开始新的对话。"
    "模型通常只能看到224×224像素，不能识别图中的中文文字，较长的描述可能包含虚构的内容。"
    "较大的图片上传需要时间；如果连接出错，请关闭代理后再试。",
    "other_language": "English",
    "picture": "图片",
    "first_question": "首个问题",
    "chat": "对话",
    "question": "输入问题",
    "edit": "修改后的问题",
    "submit": "提交",
    "stop": "停止",
    "retry": "重新回答",
    "clear": "清空对话",
    "export": "导出",
    "copied": "已复制。",
    "chatbot.copy_message": "复制",  # which gradio has in English alone
    "chatbot.copied_message": "已复制",
    "max_length": "最大长度",
    "top_p": "Top P",
    "temperature": "温度",
    "read_text": "识别图片中的文字",
    "zoom": "放大：根据图片中与问题相关的部分回答",
    "show_look": "显示模型看了哪里",
    "examples": "示例",
    "asked": "问题",
    "answered": "回答",
    "look": "模型在最后一次回答时看了哪里",
}
TEXTS = gr.I18n(en=ENGLISH, zh=CHINESE)


def words_of(language: str) -> dict[str, str]:
    """The texts for a language as browsers name it."""
    return CHINESE if language.lower().startswith("zh") else ENGLISH
