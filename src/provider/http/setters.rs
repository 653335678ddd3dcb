//! The builder methods that the HTTP providers share.

/// Adds the shared methods to an `impl` of a builder with a field `settings`.
macro_rules! shared_setters {
    () => {
        /// Sets the key. Surrounding white space is removed; an empty key counts as no key.
        #[must_use]
        pub fn api_key(mut self, key: impl Into<String>) -> Self {
            self.settings.set_key(key.into());
            self
        }

        /// Sets the address that the API's paths are appended to.
        ///
        /// A query in it is kept and sent with each call.
        #[must_use]
        pub fn base_url(mut self, url: impl Into<String>) -> Self {
            self.settings.base_url = url.into();
            self
        }

        /// Adds a header to every call. Its value is treated as a secret: `Debug` hides it,
        /// and error messages are redacted.
        #[must_use]
        pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
            self.settings.header(name, value);
            self
        }

        /// Adds a parameter to the query of every call's URL. `Debug` hides its value too, but
        /// proxies log URLs, so send secrets in a [`header`](Self::header).
        #[must_use]
        pub fn query(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
            self.settings.query.push((name.into(), value.into()));
            self
        }

        /// Sets whether to speak HTTP/2, with many calls on one connection. The default is
        /// HTTP/1.1, with a connection for each call in flight.
        ///
        /// HTTP/2 is worth it where connections are scarce: behind a proxy that counts them, or
        /// under a low limit on open files. An HTTP/2 server limits the calls on a connection
        /// (often to 100), and further calls wait. Over TLS, a server without HTTP/2 is spoken
        /// to in HTTP/1.1; with an `http://` base URL it must speak HTTP/2, because there is no
        /// negotiation. A request that the server reports as not processed (a graceful GOAWAY,
        /// REFUSED_STREAM) is resent on another connection within the same call.
        #[must_use]
        pub fn http2(mut self, enabled: bool) -> Self {
            self.settings.http2 = enabled;
            self
        }

        /// Sets the silence after which an HTTP/2 connection is pinged. If the answer takes as
        /// long again, the connection is closed and its calls fail. The default is 10 s. The
        /// value is clamped to between 10 ms and an hour.
        #[must_use]
        pub fn http2_ping(mut self, silence: Duration) -> Self {
            let (shortest, longest) = (Duration::from_millis(10), Duration::from_secs(3600));
            self.settings.ping = silence.clamp(shortest, longest);
            self
        }

        /// Sets the timeout for making a connection, including name lookup and TLS. The default
        /// is 10 s. A call that fails so was not sent and costs nothing.
        #[must_use]
        pub fn connect_timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.connect = timeout;
            self
        }

        /// Sets the timeout for the head of the reply, from the start of the call. The default
        /// is 10 min, as for the whole call, because a reply that is not streamed begins only
        /// when the model is done.
        #[must_use]
        pub fn first_byte_timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.first_byte = timeout;
            self
        }

        /// Sets the longest pause within a reply. The default is 5 min, because some models
        /// think for minutes in the middle of a stream.
        #[must_use]
        pub fn idle_timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.idle = timeout;
            self
        }

        /// Sets the timeout of a whole call. The default is 10 min; [`Request::timeout`] can
        /// only shorten it.
        #[must_use]
        pub fn timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.whole = timeout;
            self
        }

        /// Sets the largest reply accepted, in bytes: the body, or the text of a stream.
        /// The default is 16 MiB. A larger one ends as a permanent
        /// [`MalformedReply`](crate::ErrorKind::MalformedReply).
        #[must_use]
        pub fn max_body(mut self, bytes: usize) -> Self {
            self.settings.limits.max_body = bytes;
            self
        }

        /// Sets the largest event of a stream accepted, in bytes. The default is 1 MiB.
        #[must_use]
        pub fn max_event(mut self, bytes: usize) -> Self {
            self.settings.limits.max_event = bytes;
            self
        }
    };
}

pub(crate) use shared_setters;
