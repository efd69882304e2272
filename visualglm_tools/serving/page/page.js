// What the page does in the browser by itself. It stands in the page's head, so it runs before gradio does.
// `WORDS` ({en, zh}: name -> text) and `QUESTIONS` ([Chinese, English]) are put in front of it by `client.py`.
"use strict";

const visualglm = (() => {
    // ---- What is kept in the browser. It may forbid that, or have no room: then nothing is.
    const read = (storage, key) => {
        try {
            return JSON.parse(window[storage].getItem(`visualglm-${key}`));
        } catch {
            return null;
        }
    };
    const write = (storage, key, value) => {
        try {
            window[storage].setItem(`visualglm-${key}`, JSON.stringify(value));
        } catch {}
    };
    const joined = (...texts) => texts.filter(Boolean).join("\n");

    // ---- The language: as chosen, or else the browser's. Gradio's own texts follow it, too.
    const browsers = navigator.language || "zh"; // if it does not say, the original's
    const language = read("localStorage", "language") || (/^zh/i.test(browsers) ? "zh-CN" : "en");
    const isChinese = language.startsWith("zh");
    const words = isChinese ? WORDS.zh : WORDS.en;
    Object.defineProperty(navigator, "language", {get: () => language});
    Object.defineProperty(navigator, "languages", {get: () => [language]});
    const hasHan = (text) => /[\u4e00-\u9fff]/.test(text);

    // ---- This tab: its conversation's token, what is typed, the question on its way, the settings.
    const tab = read("sessionStorage", "tab") || {typed: read("localStorage", "left") || ""};
    write("localStorage", "left", ""); // what a tab that was closed has left goes to one other
    const draft = joined(tab.sent, tab.typed);
    const token = tab.token || "";
    const keep = (values) => write("sessionStorage", "tab", Object.assign(tab, values));
    keep({typed: draft, sent: ""});
    document.addEventListener("input", ({target}) => {
        if (target.closest("#question")) keep({typed: target.value});
    });
    window.addEventListener("pagehide", () => write("localStorage", "left", joined(tab.sent, tab.typed)));

    // ---- What is drawn by gradio, and lacks something for those who hear it, or copy it.
    const plain = (text) =>
        text.replace(/&(lt|gt|amp);/g, (_, name) => ({lt: "<", gt: ">", amp: "&"})[name]); // `displayed` undone
    const label = (element, name, role) => { // only where it changes something: changes are watched
        if (element && element.ariaLabel !== name) Object.assign(element, {role, ariaLabel: name});
    };
    const nameAll = () => {
        for (const picture of document.querySelectorAll("#picture img, .gallery-item img")) {
            const [, name] = /([^/]*?)(\.\w+)?$/.exec(decodeURIComponent(picture.src));
            picture.alt = name.replaceAll("_", " ");
        }
        // The name of this button must have the words in it that are seen there.
        for (const button of document.querySelectorAll("#picture button[aria-dropeffect][aria-label]"))
            button.removeAttribute("aria-label");
        for (const text of document.querySelectorAll("#chat [data-testid], #first_question label span"))
            text.lang = hasHan(text.textContent) ? "zh-CN" : "en";
        for (const [who, name] of [["user", words.asked], ["bot", words.answered]])
            for (const bubble of document.querySelectorAll(`#chat [data-testid=${who}]`)) label(bubble, name, "group");
        label(document.querySelector("#chat [role=log]"), words.chat, "log");
        for (const box of document.querySelectorAll("#chat textarea:not([aria-label])")) {
            box.ariaLabel = words.edit;
            box.value = plain(box.value);
            box.dispatchEvent(new Event("input", {bubbles: true}));
            box.focus();
        }
        document.querySelector("#chat [role=log]")?.setAttribute("aria-live", "off"); // `announce` does it
        document.querySelector("#language")?.setAttribute("lang", isChinese ? "en" : "zh-CN");
    };
    const copyPlain = () => {
        const {clipboard} = navigator;
        const writeText = clipboard?.writeText.bind(clipboard);
        if (clipboard) clipboard.writeText = (text) => writeText(plain(text)).then(() => speak(words.copied));
        document.addEventListener("copy", (event) => { // where there is no clipboard: a page without https
            if (!event.target.matches?.("body > textarea")) return; // not gradio's box for it
            event.clipboardData.setData("text/plain", plain(event.target.value));
            event.preventDefault();
            speak(words.copied);
        });
    };

    // ---- The answer for screen readers: each sentence once, when it is complete, and not all again for each token.
    let answers = 0, spoken = 0; // bubbles; characters of the last one
    const speak = (text) => {
        const part = document.createElement("p");
        part.lang = hasHan(text) ? "zh-CN" : "en";
        part.textContent = text;
        document.querySelector("#spoken [role=status]")?.append(part);
    };
    const isAnswerTo = (question, bubble) => {
        const bubbles = [...document.querySelectorAll("#chat :is([data-testid=user], [data-testid=bot])")];
        const [asked, last] = bubbles.slice(-2);
        const compact = (text) => text.replace(/\s+/g, "");
        return last === bubble && compact(asked.innerText) === compact(question);
    };
    const announce = (isComplete) => {
        const bubbles = document.querySelectorAll("#chat [data-testid=bot]");
        const text = bubbles[bubbles.length - 1]?.innerText.trim() ?? "";
        if (bubbles.length !== answers || text.length < spoken) [answers, spoken] = [bubbles.length, 0];
        if (/^[█░]/.test(text)) return; // how much of the prompt has been read
        if (text && tab.sent && isAnswerTo(tab.sent, bubbles[bubbles.length - 1])) keep({sent: ""});
        const end = isComplete ? text.length : text.slice(0, -1).search(/[。！？.!?\n][^。！？.!?\n]*$/) + 1;
        if (end <= spoken) return;
        if (spoken === 0) document.querySelector("#spoken [role=status]")?.replaceChildren();
        speak(text.slice(spoken, end).trim());
        spoken = end;
    };

    return {
        token,

        // The page is there.
        attend() {
            const update = () => (nameAll(), announce(false));
            const attributeFilter = ["src", "aria-label"];
            const changes = {childList: true, subtree: true, characterData: true, attributes: true, attributeFilter};
            new MutationObserver(update).observe(document.querySelector("#page"), changes);
            copyPlain();
            update();
        },
        // What was typed before the page was loaded again, in front of what has been typed since.
        recall: (typed) => typed === draft ? typed : joined(draft, typed),
        settings(first, ...controls) {
            const kept = tab.controls ?? [];
            return [tab.first ?? QUESTIONS[isChinese ? 0 : 1], ...controls.map((value, place) => kept[place] ?? value)];
        },
        keepSettings: (first, ...controls) => keep({controls}),
        keepFirst: (first) => keep({first}),
        keepToken: (token) => keep({token}),

        // A question leaves its box at once, without the server, so that what is typed next is not taken for a part
        // of it; but not while another one is on its way.
        send(typed, sent) {
            if (!sent && typed.trim()) [typed, sent] = ["", typed];
            else if (!sent) sent = "";
            keep({typed, sent});
            return [typed, sent];
        },
        // What was not answered comes back, in front of what has been typed meanwhile.
        giveBack(typed, unanswered) {
            typed = joined(unanswered, typed);
            keep({typed, sent: ""});
            return [typed, "", ""];
        },
        // An answer is complete.
        finish: () => announce(true),

        otherLanguage() {
            write("localStorage", "language", isChinese ? "en" : "zh-CN");
            keep({first: null});
            location.reload();
        },
        // Let the browser save a file whose bytes are in base64.
        save(base64, name) {
            if (base64) {
                const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
                const link = document.createElement("a");
                link.href = URL.createObjectURL(new Blob([bytes], {type: "application/zip"}));
                link.download = name;
                link.click();
                setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
            }
            return "";
        },
    };
})();
