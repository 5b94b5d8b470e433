// Reads {address, root, token, proto, method, requests} as JSON from stdin, asks each request and prints the answers as JSON.
// A refused call is {code, details}.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const fs = require("fs");

const given = JSON.parse(fs.readFileSync(0, "utf8"));
const definition = loader.loadSync(given.proto, { keepCase: true, longs: String, enums: String, defaults: true });
const { RetrievalService } = grpc.loadPackageDefinition(definition).retrieval.v1;
const client = new RetrievalService(given.address, grpc.credentials.createSsl(Buffer.from(given.root)));
const metadata = new grpc.Metadata();
if (given.token) metadata.set("authorization", `Bearer ${given.token}`);

const ask = (request) =>
  new Promise((resolve) =>
    client[given.method || "Retrieve"](request, metadata, { deadline: Date.now() + 20000 }, (error, answer) =>
      resolve(error ? { code: error.code, details: error.details } : answer),
    ),
  );

Promise.all(given.requests.map(ask)).then((answers) => {
  process.stdout.write(JSON.stringify(answers));
  client.close();
});
