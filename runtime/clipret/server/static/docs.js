// The service's OpenAPI document, readable.

import { $, ask, make } from "./page.js";

const code = (text) => make("code", {}, text);

function kind(schema, all) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map((one) => kind(one, all)).filter((one) => one !== "null").join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items, all)}`;
  const limits = [schema.minimum, schema.maximum].filter((one) => Number.isSafeInteger(one));
  return schema.type + (limits.length === 2 ? ` ${limits.join(" to ")}` : "");
}

function table(rows) {
  return make("table", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)))));
}

function route(path, method, operation, all) {
  const section = make("section", {}, make("h2", {}, code(`${method.toUpperCase()} ${path}`)), make("p", {}, operation.summary ?? ""));
  if (operation.description) section.append(make("p", {}, operation.description));
  const parameters = (operation.parameters ?? []).filter((one) => one.in !== "header");
  if (parameters.length) {
    section.append(table(parameters.map((one) => [code(one.name), kind(one.schema, all), one.description ?? ""])));
  }
  for (const [type, body] of Object.entries(operation.requestBody?.content ?? {})) {
    section.append(make("p", {}, code(type), ` ${kind(body.schema, all)}`));
    const properties = Object.entries(body.schema.properties ?? {});
    if (properties.length) section.append(table(properties.map(([name, one]) => [code(name), kind(one, all), one.description ?? ""])));
  }
  const answer = Object.values(operation.responses["200"]?.content ?? {})[0];
  if (answer?.schema) section.append(make("p", {}, `Answers ${kind(answer.schema, all)}.`));
  return section;
}

const api = await ask("openapi.json");
const schemas = api.components.schemas;
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) $("routes").append(route(path, method, operation, schemas));
}
for (const [name, schema] of Object.entries(schemas)) {
  if (!schema.properties || name.startsWith("HTTPValidation") || name === "ValidationError") continue;
  const rows = Object.entries(schema.properties).map(([field, one]) => [code(field), kind(one, schemas), one.description ?? ""]);
  $("routes").append(make("section", {}, make("h2", {}, name), make("p", {}, schema.description ?? ""), table(rows)));
}
