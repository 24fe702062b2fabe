// Where the page's data come from: documents of this gateway, asked for with the API key if any.
//
// Documents are polled rather than pushed, since a browser's EventSource cannot send a key.

const KEY = "epserve-api-key";
const DEADLINE_MS = 5000;

// The gateway answers, but not to who asks without this key.
export class Refused extends Error {}
// The gateway answers with an error.
export class Failed extends Error {}

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function headers() {
  const key = apiKey();
  return key ? { authorization: `Bearer ${key}` } : {};
}

// The message of an answer that is an error, in OpenAI's shape or any other.
export async function messageOf(response) {
  const text = await response.text();
  try {
    const message = JSON.parse(text).error?.message;
    if (message) return message;
  } catch {
    // Not JSON: a proxy's page, say. The status has to do.
  }
  return `${response.status} ${response.statusText}`;
}

// One document. Throws Refused, Failed, or what fetch throws when there is no answer.
export async function get(path) {
  const response = await fetch(path, {
    headers: headers(),
    cache: "no-cache",
    signal: AbortSignal.timeout(DEADLINE_MS),
  });
  if (response.status === 401 || response.status === 403) {
    throw new Refused(await messageOf(response));
  }
  if (!response.ok) throw new Failed(await messageOf(response));
  return response.json();
}
