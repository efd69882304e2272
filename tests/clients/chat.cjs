// OpenAI's client in JavaScript, unmodified: what it says about our server goes to standard output, as JSON.
// node chat.cjs ADDRESS PICTURE
const fs = require("fs");
const OpenAI = require("openai");

async function main([address, picture]) {
  const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
  const models = (await client.models.list()).data.map((model) => model.id);
  const url = `data:image/png;base64,${fs.readFileSync(picture).toString("base64")}`;
  const content = [
    { type: "text", text: "描述这张图片。" },
    { type: "image_url", image_url: { url, detail: "auto" } },
  ];
  const request = { model: models[0], messages: [{ role: "user", content }], temperature: 0, repetition_penalty: 1 };
  const whole = await client.chat.completions.create(request);
  const stream = await client.chat.completions.create({ ...request, stream: true, stream_options: { include_usage: true } });
  const pieces = [];
  let usage = null;
  for await (const chunk of stream) {
    pieces.push(chunk.choices[0]?.delta?.content ?? "");
    usage = chunk.usage ?? usage;
  }
  let refused = null;
  try {
    await client.chat.completions.create({ ...request, model: "gpt-4o" });
  } catch (error) {
    refused = { name: error.constructor.name, status: error.status, code: error.code };
  }
  const answer = whole.choices[0].message.content;
  console.log(JSON.stringify({ models, answer, streamed: pieces.join(""), tokens: usage.completion_tokens, refused }));
}

main(process.argv.slice(2));
