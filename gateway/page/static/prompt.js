// The box to try a prompt: streams POST /v1/completions, as any client of OpenAI's API would.

import { headers, messageOf } from "./source.js";

export class PromptBox {
  #page;
  #model = null;
  #running = null;

  constructor(page) {
    this.#page = page;
    page.form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#send();
    });
    page.stop.addEventListener("click", () => this.#running?.abort());
    page.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) page.form.requestSubmit();
    });
  }

  // Without a tokenizer there is no text: prompts and answers are token ids.
  setModel(model) {
    if (JSON.stringify(model) === JSON.stringify(this.#model)) return;
    this.#model = model;
    const { label, prompt } = this.#page;
    label.textContent = model.has_tokenizer ? "Prompt" : "Prompt (token ids: this model has no tokenizer)";
    prompt.placeholder = model.has_tokenizer ? "The for statement" : "1, 2, 3";
    this.#page.maxTokens.max = model.max_model_len;
  }

  // What must be there before a prompt can be answered, or nothing.
  setReady(isReady) {
    this.#page.send.disabled = !isReady || this.#running !== null;
    this.#page.send.title = isReady ? "" : "The cluster is not ready";
  }

  async #send() {
    const page = this.#page;
    if (this.#running || page.send.disabled) return;
    const prompt = this.#prompt();
    if (prompt === null) return;
    page.answer.textContent = "";
    page.note.textContent = "waiting for the first token";
    this.#running = new AbortController();
    page.send.disabled = true;
    page.stop.hidden = false;
    try {
      await this.#stream(prompt, this.#running.signal);
    } catch (error) {
      page.note.textContent = error.name === "AbortError" ? "stopped" : `failed: ${error.message}`;
    } finally {
      this.#running = null;
      page.stop.hidden = true;
      page.send.disabled = false;
    }
  }

  #prompt() {
    const text = this.#page.prompt.value || this.#page.prompt.placeholder;
    if (this.#model === null || this.#model.has_tokenizer) return text;
    const ids = text.split(/[\s,]+/).filter(Boolean);
    if (ids.length && ids.every((id) => /^\d+$/.test(id))) return ids.map(Number);
    this.#page.note.textContent = "Token ids are whole numbers, as in 1, 2, 3.";
    return null;
  }

  async #stream(prompt, signal) {
    const started = performance.now();
    const response = await fetch("v1/completions", {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json" },
      signal,
      body: JSON.stringify({
        model: this.#model?.name,
        prompt,
        max_tokens: Number(this.#page.maxTokens.value),
        temperature: Number(this.#page.temperature.value),
        stream: true,
        stream_options: { include_usage: true },
        ...(this.#model?.has_tokenizer === false ? { return_token_ids: true } : {}),
      }),
    });
    if (!response.ok) throw new Error(await messageOf(response));
    const seen = { first: null, usage: null, reason: null };
    for await (const event of events(response.body)) this.#take(event, seen, started);
    if (seen.reason === null) throw new Error("the answer broke off");
    this.#page.note.textContent = summary(seen, performance.now() - started);
  }

  #take(event, seen, started) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    seen.usage = event.usage ?? seen.usage;
    if (!choice) return;
    seen.reason = choice.finish_reason ?? seen.reason;
    const ids = choice.token_ids?.length ? `${choice.token_ids.join(", ")}, ` : "";
    const text = this.#model?.has_tokenizer === false ? ids : choice.text;
    if (!text) return;
    if (seen.first === null) {
      seen.first = performance.now() - started;
      this.#page.note.textContent = "generating";
    }
    const atEnd = this.#page.answer.scrollHeight - this.#page.answer.scrollTop - this.#page.answer.clientHeight < 24;
    this.#page.answer.append(text);
    if (atEnd) this.#page.answer.scrollTop = this.#page.answer.scrollHeight;
  }
}

function summary({ first, usage, reason }, milliseconds) {
  const words = [reason === "length" ? "reached the number of tokens" : `ended: ${reason}`];
  if (usage) {
    words.unshift(`${usage.completion_tokens} tokens in ${(milliseconds / 1000).toFixed(2)} s`);
  }
  if (first !== null) words.push(`first after ${Math.round(first)} ms`);
  return words.join(", ");
}

// The JSON values of a stream of server-sent events, up to its "[DONE]".
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
