// Dialstatus reports what became of every call that Plivo forwards. It is
// Plivo's guide "Dial Status Reporting Using Go", made fit for real calls.
// During a phone call, Plivo posts forms to two URLs of this server:
//
//	POST /dialstatus/         This is the answer URL: Plivo asks what to do
//	                          with a new call, and the answer is XML with a
//	                          <Dial>, which makes one or more phones ring.
//	                          The same URL is the callback URL, where Plivo
//	                          reports what each phone does, and the hangup
//	                          URL, where Plivo reports that the call is over.
//	POST /dialstatus/action/  This is the action URL: Plivo reports how the
//	                          <Dial> has ended, and the answer is the XML
//	                          that Plivo executes next.
//
// The A leg connects the caller with Plivo. A B leg connects Plivo with one
// phone that rings. PHLO is Plivo's visual editor for call flows; a call flow
// can also post to these URLs. Plivo signs requests: a nonce is a text that it
// invents for one request and signs with it. A title in quotes, such as "Dial
// XML", is a page of Plivo's documentation, https://www.plivo.com/docs/.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"html"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"

	"github.com/go-martini/martini"
	"github.com/plivo/plivo-go/v7/xml"
)

func main() {
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "dialstatus takes no arguments. These variables configure it:")
		for _, v := range variables {
			fmt.Fprintf(os.Stderr, "%s (default %q)\n    %s\n", v.name, v.byDefault, v.meaning)
		}
	}
	// Package flag must not print an unknown flag, which may be a secret.
	// The usage is still printed.
	flag.CommandLine.SetOutput(io.Discard)
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run serves requests until the process gets SIGTERM or SIGINT. The error says
// why the server could not start or could not go on.
func run() error {
	// The first SIGTERM or SIGINT ends this context. More signals are ignored
	// on purpose: some supervisors send two. If the process still runs four
	// seconds later, because something hangs, it ends with status 1.
	stopRequested, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(stopRequested, func() { time.Sleep(4 * time.Second); os.Exit(1) })
	// By default, SIGPIPE ends a process that writes to a closed stdout. Now
	// the write fails, and logWriter writes the record to stderr.
	signal.Ignore(syscall.SIGPIPE)
	cfg, err := configure(os.Getenv)
	if err != nil {
		return err
	}
	listener, err := listen(cfg.address)
	if err != nil {
		return fmt.Errorf("can't listen (see HOST and PORT, or the socket of systemd): %w", err)
	}
	a := newApp(cfg, &logWriter{stdout: os.Stdout, stderr: os.Stderr})
	a.log.Info("listening", "address", listener.Addr().String())
	if cfg.dialTo == exampleNumber {
		a.log.Warn("DIAL_TO is not set, or is the example number: no real number will be dialled")
	}
	if cfg.authToken == "" {
		a.log.Warn("PLIVO_AUTH_TOKEN is not set: every request is accepted. " +
			"PHLO_BASIC_AUTH alone protects nothing")
	}
	server := newServer(a)
	serveErr := make(chan error, 1)
	go func() { serveErr <- server.Serve(listener) }()
	select {
	case err := <-serveErr:
		return err
	case <-stopRequested.Done():
		a.stop(server, listener)
		return nil
	}
}

// listen returns a new socket at the address. If systemd has passed a socket
// as file descriptor 3 (see the manual page sd_listen_fds), listen returns
// that one. Connections wait in systemd's socket while this process restarts.
func listen(address string) (net.Listener, error) {
	if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		return net.FileListener(os.NewFile(3, "socket of systemd"))
	}
	return net.Listen("tcp", address)
}

// newServer returns the HTTP server of the app, with limits for its clients.
func newServer(a *app) *http.Server {
	return &http.Server{
		Handler:           a,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelError),
		MaxHeaderBytes:    12 << 10, // net/http allows 4 KiB more: 16 KiB in all
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,  // for header and body together
		WriteTimeout:      15 * time.Second,  // 10 s to read, and 5 s to answer
		IdleTimeout:       620 * time.Second, // longer than the 600 s of Google's load balancer
	}
}

// stop ends the server within 1.3 to 3.3 seconds. In the first second, it
// still accepts new connections. If the log hangs, stop does not return.
func (a *app) stop(server *http.Server, listener net.Listener) {
	// Shutdown closes idle connections. A client that sends a request at that
	// moment gets no answer. To prevent this, for one second each answer tells
	// the client to close the connection.
	a.stopping.Store(true)
	a.log.Info("stopping")
	time.Sleep(time.Second)

	// Shutdown drops a new connection if the first request has not arrived
	// yet. So the listener closes first, and then the connections that it
	// accepted last get 300 ms to send a request.
	listener.Close()
	time.Sleep(300 * time.Millisecond)

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		a.log.Warn("some connections are cut off: they have not finished a request", "cause", err)
	}
}

// config is the checked content of the environment.
type config struct {
	address        string // host:port; without a host, every address of the machine
	dialTo         string // E.164 numbers and SIP URIs, separated by commas
	callerID       string // shown by the called phone; if empty, Plivo uses the caller's
	dialTimeout    int    // in seconds; if 0, Plivo decides
	publicURL      string // without /dialstatus/; if empty, see baseURL
	callbackConfig string // the fragment of the URLs in the <Dial>; may be empty
	authToken      string // the key of the signatures; if empty, all requests are accepted
	basicAuth      string // user:password of PHLO; if empty, PHLO can't log in
}

// variables describes the environment variables. A new variable needs a row
// here, a field in config, and a line at the end of configure. HOST and PORT
// share a field. MARTINI_ENV has none: it is not used after configure.
var variables = []struct {
	name, byDefault string
	required        bool // in production the server does not start without it
	secret          bool // the value is never shown
	isValid         func(value string) bool
	meaning         string // what the value must be
}{
	{name: "DIAL_TO", byDefault: exampleNumber, required: true,
		isValid: matches(dialable + `(,` + dialable + `)*`),
		meaning: "E.164 numbers (country code first) and sip: URIs to dial, separated by commas"},
	{name: "CALLER_ID", isValid: matches(phoneNumber),
		meaning: "the number that the called phone shows, an E.164 number of your Plivo account"},
	{name: "DIAL_TIMEOUT", isValid: matches(`[1-9][0-9]{0,8}`), // nine digits fit in every int
		meaning: "the time for which phones ring, in whole seconds, at least 1"},
	{name: "PUBLIC_URL", required: true, isValid: isBaseURL,
		meaning: "the http or https URL at which Plivo reaches this server, without /dialstatus/"},
	{name: "CALLBACK_CONFIG", isValid: matches(`#?` + setting + `(&` + setting + `)*`),
		meaning: "Plivo's rules for repeating a failed report, such as rc=3&rp=5xx,ct,rt"},
	{name: "HOST", isValid: matches(`[^\s\[\]]+|\[[^\s\[\]]+\]`),
		meaning: "the name or IP address at which the server listens, without a port"},
	{name: "PORT", byDefault: "8080", isValid: matches(`[0-9]+`),
		meaning: "the number of the port at which the server listens, or 0 for any free port"},
	{name: "PLIVO_AUTH_TOKEN", required: true, secret: true, isValid: matches(`[^\s"']+`),
		meaning: "the auth token with which Plivo signs requests, without quotes or white space"},
	{name: "PHLO_BASIC_AUTH", secret: true, isValid: isLogin,
		meaning: "user:password that PHLO sends instead of a signature, without quotes around it"},
	{name: "MARTINI_ENV", byDefault: martini.Dev, isValid: matches(`development|test|production`),
		meaning: "development, test or production; production needs DIAL_TO, PUBLIC_URL and " +
			"PLIVO_AUTH_TOKEN"},
}

const (
	exampleNumber = "+12025550123" // reserved for fiction: nobody has it

	phoneNumber = `\+?[1-9][0-9]{6,14}` // E.164, with or without the +
	dialable    = `\s*(` + phoneNumber + `|sip:` + sipPart + `@` + sipPart + `)\s*`
	// sipPart: ASCII without control characters, space, quote, comma, < > @
	sipPart = `[^[:^ascii:][:cntrl:] ",<>@]+`
	httpURL = `https?://(` + urlHost + `)(:[0-9]+)?(/[\w.~%/-]*)?`
	urlHost = `[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\]` // a name, IPv4, or [IPv6]
	setting = `[a-z_]+=[A-Za-z0-9_,]+`                // a part of CALLBACK_CONFIG
)

// matches returns a function that reports whether a whole text matches.
func matches(pattern string) func(text string) bool {
	return regexp.MustCompile(`^(` + pattern + `)$`).MatchString
}

var isHTTPURL = matches(httpURL)

// isBaseURL reports whether a text is a URL that can go before /dialstatus/.
func isBaseURL(text string) bool {
	u, err := url.Parse(text)
	// The "/" is added for a text that ends with /dialstatus.
	return err == nil && isHTTPURL(text) && !strings.Contains(u.Path+"/", "/dialstatus/")
}

// isLogin reports whether a text is user:password. Neither part may be empty.
// Control characters, and quotes or spaces around the text, are not allowed.
func isLogin(text string) bool {
	user, password, _ := strings.Cut(text, ":")
	return user != "" && password != "" && strings.Trim(text, ` "'`) == text &&
		!strings.ContainsFunc(text, unicode.IsControl)
}

// configure reads and checks the environment. The error has one line for each
// problem. It does not show secrets, nor a value with an @, because
// user:password may be before the @.
func configure(getenv func(string) string) (config, error) {
	values := make(map[string]string)
	var errs []error
	for _, v := range variables {
		value := getenv(v.name)
		values[v.name] = cmp.Or(value, v.byDefault)
		if value == "" && v.required && getenv("MARTINI_ENV") == martini.Prod {
			errs = append(errs, errors.New(v.name+" is not set: MARTINI_ENV=production needs it"))
		}
		if value != "" && !v.isValid(value) {
			if v.secret || strings.Contains(value, "@") {
				value = "(not shown)"
			}
			errs = append(errs, fmt.Errorf("%s %q: it must be %s", v.name, value, v.meaning))
		}
	}
	dialTimeout, _ := strconv.Atoi(values["DIAL_TIMEOUT"]) // 0 if it is not set
	return config{
		address:        net.JoinHostPort(strings.Trim(values["HOST"], "[]"), values["PORT"]),
		dialTo:         values["DIAL_TO"],
		callerID:       values["CALLER_ID"],
		dialTimeout:    dialTimeout,
		publicURL:      strings.TrimRight(values["PUBLIC_URL"], "/"),
		callbackConfig: strings.TrimPrefix(values["CALLBACK_CONFIG"], "#"),
		authToken:      values["PLIVO_AUTH_TOKEN"],
		basicAuth:      values["PHLO_BASIC_AUTH"],
	}, errors.Join(errs...)
}

// An app answers the requests of Plivo, and logs what they report.
type app struct {
	config
	output   *logWriter
	log      *slog.Logger
	routes   martini.Router
	martini  *martini.Martini // calls the routes
	callXML  string           // the <Dial> for a new call; used if PUBLIC_URL is set
	stopping atomic.Bool      // whether stop has begun

	mu             sync.Mutex // must be locked to use the two fields below
	lastRejection  int64      // the Unix time in seconds of the last rejection
	rejectionCount int        // the number of rejections in that second
}

// newApp returns an app with all routes. A new route needs a line here and a
// handler. Martini serves each path with and without a slash at the end.
func newApp(cfg config, output *logWriter) *app {
	a := &app{config: cfg, output: output, routes: martini.NewRouter(), martini: martini.New()}
	a.log = slog.New(slog.NewJSONHandler(output, nil))
	a.callXML = dialXML(cfg, cfg.publicURL)
	a.routes.Post("/dialstatus", a.checked(a.handleAnswer))
	a.routes.Post("/dialstatus/action", a.checked(a.handleAction))
	a.routes.Get("/", a.handleProbe)
	a.routes.NotFound(a.handleNotFound)
	a.martini.Action(a.routes.Handle)
	return a
}

// ServeHTTP answers every request.
func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if a.stopping.Load() {
		w.Header().Set("Connection", "close")
	}
	a.martini.ServeHTTP(w, r)
}

// handleAnswer serves the answer URL. The answer to a new call is the <Dial>.
// Plivo also posts what a B leg does (see "Dial XML") and that a call is over
// (see "Application API"). Plivo ignores the answers to these two reports.
func (a *app) handleAnswer(w http.ResponseWriter, r *http.Request) {
	document := emptyXML
	switch {
	case r.FormValue("DialAction") != "": // what a B leg does
		a.report(r, slog.LevelInfo, "leg", "DialAction", "DialALegUUID", "DialBLegUUID",
			"DialBLegTo", "DialBLegStatus", "DialBLegDuration", "DialBLegHangupCause",
			"DialBLegHangupCauseName", "DialBLegHangupSource", "CallUUID")
	case r.FormValue("Event") == "Hangup" || finalCallStatuses[r.FormValue("CallStatus")]:
		a.report(r, slog.LevelInfo, "hangup", "CallUUID", "From", "To", "Direction",
			"CallStatus", "HangupCause", "HangupCauseName", "HangupSource", "Duration")
	default:
		a.report(r, slog.LevelInfo, "call", "CallUUID", "From", "To", "Direction", "CallStatus")
		document = a.callXML
		if a.publicURL == "" {
			document = dialXML(a.config, a.baseURL(r))
		}
	}
	w.Header().Set("Content-Type", "application/xml")
	io.WriteString(w, document)
}

// handleAction serves the action URL (see "Dial XML"): it logs how the <Dial>
// has ended, and answers with the XML that Plivo executes next.
func (a *app) handleAction(w http.ResponseWriter, r *http.Request) {
	status := r.FormValue("DialStatus")
	if status == "" {
		a.reject(w, r, http.StatusBadRequest, "DialStatus is missing: send the form that Plivo posts")
		return
	}
	level := slog.LevelInfo
	document, isKnown := documentAfter[status]
	if !isKnown {
		level = slog.LevelWarn
		document = farewellXML("The call has ended.")
	}
	a.report(r, level, "dial", "DialStatus", "DialALegUUID", "DialBLegUUID",
		"DialRingStatus", "DialHangupCause", "CallUUID", "From", "To")
	w.Header().Set("Content-Type", "application/xml")
	io.WriteString(w, document)
}

// handleProbe tells a monitor whether the server works. If the log hangs,
// calls hang, too, because a request is answered after its record is written.
// Martini sends the status and the text that are returned here.
func (a *app) handleProbe() (int, string) {
	if a.output.isStuck() {
		return http.StatusServiceUnavailable, "the log accepts no records\n"
	}
	return http.StatusOK, "dialstatus is running: the answer URL is /dialstatus/\n"
}

// handleNotFound rejects an unknown path with status 404, and a known path
// with the wrong method, such as GET /dialstatus/, with status 405.
func (a *app) handleNotFound(w http.ResponseWriter, r *http.Request) {
	status := http.StatusNotFound
	if methods := a.routes.MethodsFor(r.URL.Path); len(methods) > 0 {
		status = http.StatusMethodNotAllowed
		w.Header().Set("Allow", strings.Join(methods, ", "))
	}
	a.reject(w, r, status, "this path does not serve "+r.Method+". Send POST to /dialstatus/ or "+
		"/dialstatus/action/ instead, such as: curl -d CallStatus=ringing "+a.baseURL(r)+"/dialstatus/")
}

var (
	// finalCallStatuses lists each CallStatus of a call that is over.
	finalCallStatuses = map[string]bool{"completed": true, "busy": true, "failed": true,
		"timeout": true, "no-answer": true, "cancel": true}

	// documentAfter maps a DialStatus to the XML that Plivo executes next.
	documentAfter = map[string]string{
		"completed": responseXML(new(xml.HangupElement)),
		"cancel":    responseXML(new(xml.HangupElement)),
		"busy":      farewellXML("The line is busy. Please try again later."),
		"no-answer": farewellXML("Nobody answered. Please try again later."),
		"timeout":   farewellXML("The call could not be connected in time. Please try again later."),
		"failed":    farewellXML("The call could not be connected."),
	}
	emptyXML = responseXML()
)

// farewellXML returns a document that says a sentence and hangs up.
func farewellXML(sentence string) string {
	return responseXML(new(xml.SpeakElement).AddSpeak(sentence), new(xml.HangupElement))
}

// dialXML returns the document for a new call. The URLs in a <Dial> must be
// fully qualified (see "Dial XML"), so they begin with the base URL.
func dialXML(cfg config, baseURL string) string {
	var phones []any
	for phone := range strings.SplitSeq(cfg.dialTo, ",") {
		// plivo-go escapes attributes, but not the text of these elements.
		phone = html.EscapeString(strings.TrimSpace(phone))
		if strings.HasPrefix(phone, "sip:") {
			phones = append(phones, new(xml.UserElement).SetContents(phone))
		} else {
			phones = append(phones, new(xml.NumberElement).SetContents(phone))
		}
	}
	// Plivo reads its rules for repeating reports from the fragment of a URL.
	// If CALLBACK_CONFIG is not set, the fragment and the # are left out.
	fragment := (&url.URL{Fragment: cfg.callbackConfig}).String()
	dial := new(xml.DialElement).
		SetAction(baseURL + "/dialstatus/action/" + fragment).
		SetMethod(http.MethodPost).
		SetRedirect(true).
		SetCallbackUrl(baseURL + "/dialstatus/" + fragment).
		SetCallbackMethod(http.MethodPost).
		SetContents(phones)
	if cfg.callerID != "" {
		dial = dial.SetCallerID(cfg.callerID) // a setter returns a changed copy
	}
	if cfg.dialTimeout > 0 {
		dial = dial.SetTimeout(cfg.dialTimeout)
	}
	return responseXML(dial)
}

// responseXML returns a document with these elements.
func responseXML(elements ...any) string {
	return xml.ResponseElement{Contents: elements}.String()
}

// checked returns a handler that calls next if form and sender are valid.
func (a *app) checked(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if status, reason := readForm(r); status != http.StatusOK {
			a.reject(w, r, status, reason)
			return
		}
		if !a.isAuthorized(r) {
			a.reject(w, r, http.StatusForbidden, "the request has no valid signature or login. "+
				"Check that PUBLIC_URL is the URL that Plivo calls, and that PLIVO_AUTH_TOKEN "+
				"is the auth token of the account that owns the phone number")
			return
		}
		next(w, r)
	}
}

// readForm puts the fields of the body into r.PostForm, and those of body and
// query into r.Form. It returns status 200, or why to reject the request.
// Request.ParseForm is slower, and accepts a body that is not a form.
func readForm(r *http.Request) (status int, reason string) {
	const maxBody = 16 << 10 // bytes; Plivo sends less than 2 KiB
	const formType = "application/x-www-form-urlencoded"
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if len(body) > maxBody {
		return http.StatusRequestEntityTooLarge, fmt.Sprint("send a body of at most ", maxBody, " bytes")
	}
	if err != nil {
		return http.StatusBadRequest, "the body was cut off or came too slowly: send the whole body"
	}
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if len(body) > 0 && !strings.EqualFold(strings.TrimSpace(mediaType), formType) {
		return http.StatusUnsupportedMediaType, "the body is not a form: send it as " + formType
	}
	form, formErr := url.ParseQuery(string(body))
	query, queryErr := url.ParseQuery(r.URL.RawQuery)
	if formErr != nil || queryErr != nil {
		return http.StatusBadRequest,
			"the form or the query is not URL-encoded: write % as %25, and ; as %3B"
	}
	r.PostForm, r.Form = form, form
	if len(query) > 0 {
		maps.Copy(query, form) // if a name is in both, the form wins
		r.Form = query
	}
	return http.StatusOK, ""
}

// isAuthorized reports whether to serve a request.
func (a *app) isAuthorized(r *http.Request) bool {
	if a.authToken == "" {
		return true
	}
	user, password, _ := r.BasicAuth()
	if a.basicAuth != "" && hmac.Equal([]byte(user+":"+password), []byte(a.basicAuth)) {
		return true
	}
	return a.isSigned(r)
}

// isSigned reports whether the request has a signature V3 that was made with
// the auth token (see "Signature Validation"). Each of the two headers with V3
// signatures may be sent several times, and may hold a list with commas. One
// correct signature is enough.
func (a *app) isSigned(r *http.Request) bool {
	nonce := r.Header.Get("X-Plivo-Signature-V3-Nonce")
	if nonce == "" || strings.Contains(nonce, ".") {
		// The signed text ends with the form (without any =), a dot and the
		// nonce. These two requests have the same text and the same signature:
		//	the form To=1.2 with the nonce 7, and To1.2.7 is signed
		//	the form To=1 with the nonce 2.7, and To1.2.7 is signed
		// So an attacker who has captured the first could send the second.
		return false
	}
	text := signedText(a.baseURL(r)+r.URL.EscapedPath(), r.URL.Query(), r.PostForm, nonce)
	signature := []byte(sign(a.authToken, text))
	for _, header := range slices.Concat(
		r.Header.Values("X-Plivo-Signature-V3"), r.Header.Values("X-Plivo-Signature-Ma-V3")) {
		for sent := range strings.SplitSeq(header, ",") {
			if hmac.Equal([]byte(strings.TrimSpace(sent)), signature) {
				return true
			}
		}
	}
	return false
}

// sign returns the signature V3 of a text: HMAC-SHA256, in base64.
func sign(authToken string, text []byte) string {
	mac := hmac.New(sha256.New, []byte(authToken))
	mac.Write(text)
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// signedText returns the text that Plivo signs for a POST (signature V3, see
// "Signature Validation"), such as
//
//	https://example.com/dialstatus/?a=1&b=2.CallStatusbusyTo12025550199.7019
//
// It has four parts: the called URL with its path, the query, the form and the
// nonce. Query and form are decoded, and sorted by name and value.
//
// The function of plivo-go is not used. It ignores the second value of a name
// in the query, and some dots and ampersands at the end of query or form. So
// an attacker could add these to a captured request, with the same signature.
func signedText(calledURL string, query, form url.Values, nonce string) []byte {
	text := bytes.NewBuffer(make([]byte, 0, 1024)) // enough for what Plivo sends
	text.WriteString(calledURL)
	if len(query) > 0 || len(form) > 0 {
		text.WriteString("?")
	}
	writeSorted(text, query, "=", "&")
	if len(query) > 0 && len(form) > 0 {
		text.WriteString(".")
	}
	writeSorted(text, form, "", "")
	text.WriteString("." + nonce)
	return text.Bytes()
}

// A parameter is one name and one value in a query or a form.
type parameter struct{ name, value string }

// writeSorted writes the parameters to the text, sorted by name and then by
// value, with these separators after each name and between parameters.
func writeSorted(text *bytes.Buffer, values url.Values, afterName, between string) {
	parameters := make([]parameter, 0, len(values))
	for name, valuesOfName := range values {
		for _, value := range valuesOfName {
			parameters = append(parameters, parameter{name, value})
		}
	}
	slices.SortFunc(parameters, func(a, b parameter) int {
		return cmp.Or(strings.Compare(a.name, b.name), strings.Compare(a.value, b.value))
	})
	for i, p := range parameters {
		if i > 0 {
			text.WriteString(between)
		}
		text.WriteString(p.name)
		text.WriteString(afterName)
		text.WriteString(p.value)
	}
}

// baseURL returns the part of the called URL before /dialstatus/. If
// PUBLIC_URL is not set, scheme and host come from the headers of a proxy or
// from the request; if there is no host, the result is empty. Plivo signs the
// URL without the default port, which some proxies add.
func (a *app) baseURL(r *http.Request) string {
	if a.publicURL != "" {
		return a.publicURL
	}
	host := cmp.Or(firstEntry(r.Header.Get("X-Forwarded-Host")), r.Host)
	if host == "" {
		return ""
	}
	if strings.EqualFold(firstEntry(r.Header.Get("X-Forwarded-Proto")), "https") {
		return "https://" + strings.TrimSuffix(host, ":443")
	}
	return "http://" + strings.TrimSuffix(host, ":80")
}

// firstEntry returns the first entry of a list with commas. It comes from the
// first proxy, which Plivo called.
func firstEntry(list string) string {
	entry, _, _ := strings.Cut(list, ",")
	return strings.TrimSpace(entry)
}

// report logs a record, such as "leg", with the values of these fields.
func (a *app) report(r *http.Request, level slog.Level, record string, fields ...string) {
	attributes := make([]slog.Attr, len(fields))
	for i, field := range fields {
		attributes[i] = slog.String(field, truncate(r.FormValue(field)))
	}
	a.log.LogAttrs(r.Context(), level, record, attributes...)
}

// reject answers a request with the reason for the refusal, and may log it.
func (a *app) reject(w http.ResponseWriter, r *http.Request, status int, reason string) {
	if a.mayLogRejection() {
		a.log.Warn("rejected", "HTTPStatus", status, "reason", truncate(reason),
			"path", truncate(r.URL.Path), "calledURL", truncate(a.baseURL(r)+r.URL.RequestURI()),
			"peer", r.RemoteAddr,
			"X-Forwarded-For", truncate(strings.Join(r.Header.Values("X-Forwarded-For"), ", ")))
	}
	http.Error(w, truncate(reason), status)
}

// mayLogRejection reports whether this is one of the first 20 rejections in a
// second of the clock. Without a limit, an attacker could fill the disk.
func (a *app) mayLogRejection() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now().Unix()
	if now != a.lastRejection {
		a.lastRejection, a.rejectionCount = now, 0
	}
	a.rejectionCount++
	return a.rejectionCount <= 20
}

// truncate returns the first 256 bytes of a text. JSON may write one byte as
// six, such as \u0001. So the ten values of a "leg" record need 15,360 bytes
// or less, and the record is shorter than 16 KiB, where Docker splits a line.
func truncate(text string) string { return text[:min(len(text), 256)] }

// A logWriter writes records to stdout, or to stderr if stdout fails. slog
// calls Write with one whole record, and never twice at the same time.
type logWriter struct {
	stdout, stderr io.Writer
	isTorn         bool         // whether stdout ends with only a part of a record
	writingSince   atomic.Int64 // Unix time in milliseconds; 0: no record is being written
}

// Write writes a record. It returns an error if stdout and stderr have failed.
func (l *logWriter) Write(record []byte) (int, error) {
	l.writingSince.Store(time.Now().UnixMilli())
	defer l.writingSince.Store(0)
	line := record
	if l.isTorn { // end the torn line first
		line = append([]byte("\n"), record...)
	}
	n, err := l.stdout.Write(line)
	if n > 0 {
		l.isTorn = line[n-1] != '\n'
	}
	if err != nil {
		slog.New(slog.NewJSONHandler(l.stderr, nil)).Error("stdout failed", "cause", err)
		return l.stderr.Write(record)
	}
	return len(record), nil
}

// isStuck reports whether a write has lasted for four seconds or more. This
// happens if stdout is a pipe that nobody reads.
func (l *logWriter) isStuck() bool {
	since := l.writingSince.Load()
	return since != 0 && time.Since(time.UnixMilli(since)) >= 4*time.Second
}
